"""Floor 6, training of the embedded model from scratch: corpus, autoencoder, denoiser with text encoder, model card."""
