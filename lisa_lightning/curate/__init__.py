"""Choices of alignment rows, one file each: the provider's rows in, those worth training on out."""
