"""Lightning callbacks: evaluation curves, checkpoints, progress."""
