"""The ladder: the same student by every training that its users would think of, on equal data, updates and seeds."""
