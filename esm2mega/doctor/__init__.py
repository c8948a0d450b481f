"""Checks by small trials whether this machine, and all hosts of a job, can train, and names the cures."""
