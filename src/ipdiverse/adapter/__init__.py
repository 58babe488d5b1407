"""The model: projection, decoupled attention, checkpoints, and attaching it to a pipeline."""
