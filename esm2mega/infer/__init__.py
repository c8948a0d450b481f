"""Turns weights into what users take away: embeddings, logits, contacts and scores of variants."""
