"""Training: losses, the optimizer, one step, the loop, and the runs that it serves."""
