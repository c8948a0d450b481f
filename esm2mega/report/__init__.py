"""What a run tells its user: the JSONL log, the progress line, external trackers and the plotted report."""
