"""Timings. `python -m benchmarks.run` is the one to begin with; others record the figures of docs/performance.md."""
