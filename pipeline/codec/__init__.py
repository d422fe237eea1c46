"""What the teacher said: distributions as bytes, shards of them, and whose they are."""
