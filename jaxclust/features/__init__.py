"""Features: one pass over a split on all devices, rows ordered by id."""
