"""From files to step batches: source -> rows -> encoded examples -> streams interleaved by state."""
