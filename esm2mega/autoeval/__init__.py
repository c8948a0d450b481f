"""Measures models against each other, and says which differences are more than noise."""
