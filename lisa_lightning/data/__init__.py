"""Data pipeline: source -> rows -> encoded examples -> streams -> batches of optimizer steps."""
