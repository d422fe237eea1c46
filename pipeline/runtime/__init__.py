"""How a step runs: engine, batches, checkpoints, ranks, metrics."""
