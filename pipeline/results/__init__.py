"""What came of a run: evaluation, traces, status, export."""
