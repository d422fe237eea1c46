"""Compare the losses with their matrix products and with other packages."""
