"""Losses and gradients that methods build on: the completion loss, backward passes, the proximal term."""
