"""Joins UniRef50 clusters with UniRef90 sequences into a store for sampling by cluster."""
