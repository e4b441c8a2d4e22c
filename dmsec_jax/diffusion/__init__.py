"""Floor 2, the forward and reverse process on callables `model_fn(z_t, t)`.

schedule, draws and loss are the forward half; samplers, multistep and guidance the reverse half.
"""
