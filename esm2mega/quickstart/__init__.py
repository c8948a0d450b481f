"""The first five minutes: simulated protein families, and a run on them from start to report."""
