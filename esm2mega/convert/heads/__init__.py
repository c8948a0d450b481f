"""Converts the heads of other formats, classifiers and contact regressions, to ours and back."""
