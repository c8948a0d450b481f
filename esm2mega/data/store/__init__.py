"""Token stores: sequences on disk as tokens, written in parts that survive a kill, read by memory map."""
