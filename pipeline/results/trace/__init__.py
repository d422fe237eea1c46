"""What each target layer of a model says about a question."""
