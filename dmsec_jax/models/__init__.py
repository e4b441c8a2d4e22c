"""Floor 1, the networks, and the only folder that imports flax: layers, attention, unet, vae, clip, presets, feature networks.

Each network module has a frozen `Config` dataclass, `init(key, cfg) -> params` and an apply function of `(cfg, params, inputs...)`.
Parameter paths mirror the diffusers state dict: dots become "/", a numeric segment joins the one before it with "_".
"""
