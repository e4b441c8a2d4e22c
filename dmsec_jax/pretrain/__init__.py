"""Floor 6, training of the embedded model from nothing: corpus, autoencoder, denoiser with text encoder, model card."""
