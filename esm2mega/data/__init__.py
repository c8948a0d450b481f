"""From FASTA to masked packs: fasta -> tokenizer -> store, then sampling -> packing -> masking -> loader."""
