"""What a distribution becomes as bytes, and is again: codecs, their packing, and what they draw from."""
