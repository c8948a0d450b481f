"""LoRA on parallel linears: adapters, trained and saved without the base, merged, exchanged with PEFT."""
