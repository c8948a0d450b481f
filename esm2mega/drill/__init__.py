"""Kills the processes of a user's own training at random moments, and proves that nothing was lost."""
