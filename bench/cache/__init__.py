"""The cache's codecs beside other systems': bytes against error."""
