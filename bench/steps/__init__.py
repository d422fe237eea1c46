"""Compare whole steps with plain ones; measure the data wait and the start-up time."""
