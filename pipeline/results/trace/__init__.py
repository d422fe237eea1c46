"""Predictions of each target layer of a model for one question."""
