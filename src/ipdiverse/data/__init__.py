"""Images and captions to train on: from any source to one validated manifest, and references."""
