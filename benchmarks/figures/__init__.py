"""Tables and plots of the README, made from the result files and from nothing else."""
