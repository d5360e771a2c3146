"""Timings; `pytest benchmarks` for a table, the scripts for recorded figures (benchmarks/results)."""
