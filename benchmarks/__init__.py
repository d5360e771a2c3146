"""Measurements: `python -m benchmarks --help`. docs/performance.md holds what they found."""
