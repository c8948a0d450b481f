"""Computes ESM-2 on Megatron-Core: a pack of token ids goes in, hidden states or logits come out."""
