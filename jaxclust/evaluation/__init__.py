"""Judges predictions: arrays in, numbers out; sees no model and no file."""
