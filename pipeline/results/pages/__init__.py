"""Pages that open anywhere, offline: their templates, and pictures inside them."""
