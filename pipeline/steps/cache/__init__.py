"""Stage 1b in parts: the step itself, the teacher's pass, the size estimate, the writing thread."""
