"""Whole steps beside plain ones, the data wait, the start-up."""
