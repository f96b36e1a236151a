"""Measuring: sums over a split, text from a model."""
