"""Measurements of torch_flash2 beside its peers: `python -m benchmarks --help`."""
