"""What a run shows while it goes on: the terminal's panel, log lines, maps of the KL between layers."""
