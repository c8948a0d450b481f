"""Our model on a GPU; the same functions run on the CPU where there is none, so that they cannot rot."""
