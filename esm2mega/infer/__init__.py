"""From weights to what users take away: embeddings, logits, contacts, variant scores."""
