"""Plots and tables of the README from result files: one module per block, named like the block; `python -m benchmarks.report` runs them."""
