"""Labels of proteins: cells of files become targets, and targets go beside packs of tokens."""
