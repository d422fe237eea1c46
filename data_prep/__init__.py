"""Instruction data to WebDataset shards. Imports neither torch nor the pipeline."""
