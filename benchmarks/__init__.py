"""Benchmarks against the published implementations, measured side by side. `make bench` runs all of them."""
