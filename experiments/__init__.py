"""The paper's claims at the embedded scale, one folder each. Start at `python -m experiments`."""
