"""Metrics, the run directory, the terminal and videos."""
