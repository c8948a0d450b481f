"""Labels of proteins: files become cells, cells become targets, and targets go beside packs of tokens."""
