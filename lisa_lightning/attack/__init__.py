"""Attacks of the user: config group `attack`, one file per attack. Start at `base`."""
