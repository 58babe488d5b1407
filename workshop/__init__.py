"""Training and measuring of the shipped weights; not installed with the package."""
