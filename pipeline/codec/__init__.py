"""Codecs: teacher distributions to bytes and back, with record packing, random numbers and the vocabulary order."""
