"""One module for each kind of sequence file; all give records in blocks."""
