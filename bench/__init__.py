"""One script for each claim of the README: run as `python -m bench.NAME`, results in bench/results/NAME.json."""
