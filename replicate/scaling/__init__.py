"""Scaling laws: fits, intervals, tests and compute-optimal allocation (numpy and scipy only)."""
