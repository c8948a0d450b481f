"""Runs examples/slurm on a Slurm of one node: `python -m tests.slurm`, see docs/multi-node.md."""
