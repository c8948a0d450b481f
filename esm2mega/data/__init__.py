"""From files to masked packs: sources -> parts -> store, then sampling -> packing -> masking -> loader."""
