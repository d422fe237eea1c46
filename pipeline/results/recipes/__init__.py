"""`python -m pipeline recipes`: the shipped recipes, and a first one for two models."""
