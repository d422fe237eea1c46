"""Teacher caches on disk: folders, identity, fingerprints, writing and reading. Nothing here loads a model."""
