"""Hostile inputs, kills and damage; a small part of each kind runs by default, the rest is slow."""
