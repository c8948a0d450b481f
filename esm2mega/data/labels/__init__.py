"""Reads labels of proteins from the cells of files, and puts them beside packs of tokens."""
