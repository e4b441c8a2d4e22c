"""`python -m benchmarks.throughput`: every method against PyTorch on the same weights, side by side.

timing     alternating blocks, compile time apart, medians with intervals
cases      what a row is: our compiled program, its peers, and the comparison of what both computed
networks   rows of single networks
methods    rows of sampling and attacks
training   rows of fine-tuning steps
others     rows of similarities with their groups, and of SPOT
"""
