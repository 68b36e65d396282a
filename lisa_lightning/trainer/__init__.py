"""Training: `LisaModule`, the optimizer's settings, checkpoint files."""
