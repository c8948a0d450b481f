"""Tells the user about a run: the log, the progress line, external trackers and the plotted report."""
