"""`cache-info`: the contents of a teacher cache, its fidelity to the teacher, and verification of its files."""
