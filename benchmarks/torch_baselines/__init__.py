"""PyTorch on the same weights: what `benchmarks.throughput` measures against.

Each method exists twice, on diffusers and transformers modules:

    public   in the structure of the papers' public code: one picture at a time (FineXtract: five), Python loops, constants encoded anew
    best     as good as PyTorch can be made on a CPU: batched, cached, channels-last, fused optimisers, and compiled if the caller says so

A baseline is a function without arguments that runs a fixed number of steps and returns named tensors as NumPy arrays are asked for
(`Outcome`). It takes the random numbers of its steps from the caller, or draws its own: with the caller's, both sides can be compared; with its
own, it does all the work that it would have to do alone.

networks   modules from a folder or a configuration, and how they are prepared
passes     forward passes and gradients of single networks
attacks    AdvDM, SDS, CGI-DM
sampling   FineXtract
training   DreamBooth, LoRA, variational
causal     ABIC's objective as published, and in covariance form; steps of Adam on both
posterior  SPOT's skeleton posterior
groups     similarities of all pairs, and groups of them
"""
