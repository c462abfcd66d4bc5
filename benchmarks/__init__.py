"""Measurements and comparisons; run with `python -m benchmarks.NAME`."""
