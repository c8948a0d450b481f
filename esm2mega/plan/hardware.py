"""Says how fast a machine is: rates that a job reaches, named for two GPUs or given by the user."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """Holds the rates of one GPU and of what connects it; they are what is reached, not what a sheet says.

    Attributes:
        name: How the rates are called.
        half: Products of matrices in bf16 or fp16, in TFLOP/s.
        full: The same in fp32, without TF32.
        memory: Bytes per second that pointwise operations read and write.
        link: Bytes per second to GPUs of the same host, in one direction.
        network: Bytes per second to other hosts, in one direction.
        per_host: GPUs of a host.
    """

    name: str
    half: float
    full: float
    memory: float
    link: float
    network: float
    per_host: int = 8

    def products(self, precision: str) -> float:
        """Return the operations per second of matrix products."""
        return 1e12 * (self.half if precision in ("bf16", "fp16") else self.full)


HARDWARE = {
    "a100": Hardware("a100", half=240, full=18, memory=1.6e12, link=2.4e11, network=2.0e10),
    "h100": Hardware("h100", half=650, full=50, memory=2.7e12, link=3.6e11, network=4.0e10),
}
"""Names rates of 80 GB cards with NVLink and one network card each: about 80 % of what the sheets say of
memory, links (300 and 450 GB/s) and network (200 and 400 Gbit/s), and 77 % and 66 % of the bf16 rate."""
