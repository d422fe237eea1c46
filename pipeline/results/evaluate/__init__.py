"""Exact match and perplexity of models on held-out data."""
