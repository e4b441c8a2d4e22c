"""Benchmarks: each prints a table for people and one JSON line last, and writes `benchmarks/results/<bench>/<device>/<date>_<sha>.json`."""
