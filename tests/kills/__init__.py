"""Kills commands at random moments, starts them again, and compares what is left with an unbroken run."""
