"""Where a teacher's distributions lie, whose they are, and who may read them. Knows no model."""
