"""Training: state, optimiser, step, checkpoint, metrics and the one loop."""
