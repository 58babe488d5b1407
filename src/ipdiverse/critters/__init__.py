"""The embedded world: scenes that are known exactly, and the models trained on them."""
