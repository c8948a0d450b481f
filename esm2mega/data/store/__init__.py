"""Keeps sequences as tokens on disk: stores are written in parts that survive a kill, and memory-mapped."""
