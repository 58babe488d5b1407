"""Training of the embedded base model."""
