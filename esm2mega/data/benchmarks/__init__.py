"""Published benchmark tasks (FLIP, TAPE, DeepLoc 2) become tables of labelled proteins."""
