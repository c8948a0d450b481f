"""Adds LoRA adapters to parallel linears: trained and saved without the base, merged, exchanged with PEFT."""
