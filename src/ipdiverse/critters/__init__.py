"""The embedded world: scenes that are known exactly, and the weights of models trained on them."""
