"""Pretrained language weights and pictures that others drew: teacher, student and data (docs/real_weights.md)."""
