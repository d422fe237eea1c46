"""Losses and matching: tensors in, tensors out."""
