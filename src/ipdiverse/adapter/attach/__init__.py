"""Putting adapters on stock pipelines, and taking them off."""
