"""Loggers of a run: curves.csv and Weights & Biases."""
