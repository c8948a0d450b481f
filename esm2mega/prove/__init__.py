"""The proof that training is the same at every parallel layout, as a command."""
