"""How a run spreads over processes and devices, and how Megatron-Core runs without CUDA."""
