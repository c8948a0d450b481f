"""Other checkpoint formats, in and out: one name table per format, tensors streamed, files not trusted."""
