"""Benchmarks: headrace bench NAME."""
