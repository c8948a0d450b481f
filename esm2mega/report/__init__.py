"""What a run tells its user: the log, the progress line, external trackers and the plotted report."""
