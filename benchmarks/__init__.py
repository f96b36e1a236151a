"""Measurements against other tools; each is run as `python -m benchmarks.NAME`."""
