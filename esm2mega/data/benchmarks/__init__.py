"""Turns published benchmark tasks (FLIP, TAPE, DeepLoc 2) into tables of labelled proteins."""
