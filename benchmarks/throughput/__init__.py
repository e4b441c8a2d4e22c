"""`python -m benchmarks.throughput`: every method against PyTorch on the same weights, side by side; `.growth`: how our side grows.

process    equally many cores for all, large pages
timing     alternating blocks, compile time apart, medians with intervals
limits     what the machine can do at most, and what binds a row
cases      what a row is: our compiled program, its peers, and the comparison of what both computed
measuring  one row
rows       all rows by name:
networks       single networks
methods        sampling and attacks
training       fine-tuning steps
others         similarities with their groups
discovery      SPOT
growth     time and memory over batch, resolution, draws, pictures, variables
compiling  compile time without and with the persistent cache
"""
