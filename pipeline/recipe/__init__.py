"""Recipes: the fields of a run, their checks, and where each value came from. Nothing here imports torch."""
