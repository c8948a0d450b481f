"""Shows the first five minutes: simulates protein families, and runs on them from start to report."""
