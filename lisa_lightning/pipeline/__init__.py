"""A run from its command to its report: `command`, then `run`, then the stages in `stages/`."""
