"""Trains on two hosts, loses one, and goes on: `python -m tests.multinode`, see docs/multi-node.md."""
