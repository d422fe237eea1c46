"""What ends a run, or nearly: signals, errors, losses that are not finite, memory, ranks that stand still."""
