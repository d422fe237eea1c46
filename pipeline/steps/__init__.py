"""The four steps, in running order. None imports another: they meet on disk."""
