"""Reads sequence files, with one module for each format; each reads records in blocks."""
