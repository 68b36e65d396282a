"""Losses and gradients that methods build on: the completion loss, backward backprop, the proximal term."""
