"""Measures how fast this machine computes, reads, trains and embeds, and other programs beside it."""
