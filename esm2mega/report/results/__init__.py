"""Shows the results of a suite of benchmarks as one page."""
