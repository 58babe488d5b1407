"""Train the embedded base model from nothing: stages vae, clip, unet and oracle."""
