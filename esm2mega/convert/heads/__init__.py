"""Heads of other formats, classifiers and contact regressions, to and from ours."""
