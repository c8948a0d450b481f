"""Finds related proteins in different splits, by MMseqs2 or by a built-in screen of shared k-mers."""
