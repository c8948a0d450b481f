"""One module for each kind of sequence file; each reads records in blocks."""
