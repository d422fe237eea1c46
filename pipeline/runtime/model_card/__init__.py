"""The README.md of a trained student, from what its run's folder says."""
