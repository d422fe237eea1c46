"""Check on a GPU, in minutes, what a CPU cannot show; a tiny twin of it runs on a CPU."""
