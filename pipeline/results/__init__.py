"""Results of a run: evaluation, traces, cache information, status, and the environment."""
