"""How a run starts: the programs that DeepSpeed's launcher runs, and what an installation calls them."""
