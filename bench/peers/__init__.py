"""The demo's student by the tools that people use today, beside ours: one run, one table (docs/peers.md)."""
