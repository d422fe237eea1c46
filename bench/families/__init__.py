"""Which image-text-to-text families of the installed transformers the pipeline takes: a sweep, not part of CI."""
