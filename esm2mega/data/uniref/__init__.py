"""UniRef50 clusters over UniRef90 sequences, joined into a store for cluster sampling."""
