"""Holds the kernels of our own: C++ that is compiled for the processor, Triton for GPUs, products in int8."""
