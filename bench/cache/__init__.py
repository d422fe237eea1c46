"""Compare the cache's codecs with those of other systems: bytes against error."""
