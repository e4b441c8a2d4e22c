"""Floor 0, mathematics that has never heard of diffusion: types, config, checks, files, trees, arrays, projected gradients."""
