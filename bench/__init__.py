"""Benchmarks, one package for each claim of the README: `python -m bench.NAME` writes bench/results/NAME.json."""
