"""Experiments: does Local Linear Attention help, and at what price? docs/experiments.md has what came of them."""
