"""`evaluate --benchmarks`: the field's benchmarks by lmms-eval, beside the paper's numbers."""
