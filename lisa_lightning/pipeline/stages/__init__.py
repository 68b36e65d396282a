"""Stages of a run, one per file. Results are cached under a hash of all their inputs."""
