"""Training-free rivals of the product's levers. Importing this package registers them."""
