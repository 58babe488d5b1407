"""Base models: which there are, opening them, and where they run."""
