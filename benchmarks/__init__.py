"""Ratios to what the published implementations do, measured side by side; `make bench` runs them all."""
