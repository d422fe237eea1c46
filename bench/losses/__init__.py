"""The losses beside their matrix products and other packages."""
