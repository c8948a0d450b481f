"""The measurements of `gpu.py` by name: what each one measures, at which sizes, and how long it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Line:
    """One measurement, which runs in a process of its own.

    Attributes:
        name: How the command line and the journal call it.
        measurement: Key of `gpu_measure.MEASUREMENTS`.
        limit: Seconds after which its process is ended.
        size: Preset of the model.
        tokens: Of a micro-batch.
        micro_batches: Of a step, or of a pass where nothing is trained.
        full_length: Proteins of 1,024 tokens each, instead of lengths as in UniRef90.
        precision: Of our model.
        attention: Value of `model.attention_backend`.
        layer_spec: Value of `model.layer_spec`.
        fp8: Value of `model.fp8`, which needs Transformer Engine; None for none.
        recompute: Value of `model.recompute`.
        compiled: Whether Hugging Face's model, or what our layers compute around attention, is compiled.
        on_cpu: Runs on the CPU, whether there is a GPU or not.
        reference: The line whose gradients and weights this one's are compared with.
        warm_up: Uncounted repetitions.
        repetitions: Counted ones.
    """

    name: str
    measurement: str
    limit: int
    size: str = "8M"
    tokens: int = 4096
    micro_batches: int = 1
    full_length: bool = False
    precision: str = "bf16"
    attention: str = "auto"
    layer_spec: str = "auto"
    fp8: str | None = None
    recompute: str = "none"
    compiled: bool = False
    on_cpu: bool = False
    reference: str | None = None
    warm_up: int = 3
    repetitions: int = 6

    @property
    def changes(self) -> list[str]:
        """What a run of this line changes in the shipped configuration of its size."""
        return [
            "optim.lr=1e-4",
            "schedule.warmup_steps=0",
            f"model.precision={self.precision}",
            f"model.attention_backend={self.attention}",
            f"model.layer_spec={self.layer_spec}",
            f"model.fp8={self.fp8 or 'null'}",
            f"model.recompute={self.recompute}",
            f"model.compile={str(self.compiled).lower()}",
        ]

    def reduced(self) -> Line:
        """The same measurement in seconds on a CPU: it shows that the code runs; its figures mean nothing."""
        return replace(
            self,
            size="tiny",
            tokens=256,
            micro_batches=min(self.micro_batches, 2),
            # The other kernels need CUDA, and so does Transformer Engine.
            attention="sdpa",
            layer_spec="auto",
            fp8=None,
            on_cpu=True,
            warm_up=1,
            repetitions=2,
        )


CPU_FP32 = "parity-cpu-fp32-sdpa"
VARLEN = "parity-bf16-varlen"

# What the others are read against comes first, and what can be left out when the time is over comes last.
LINES = (
    Line("peaks", "peaks", 60),
    Line(CPU_FP32, "parity", 90, precision="fp32", attention="sdpa", on_cpu=True),
    Line("parity-fp32-sdpa", "parity", 60, precision="fp32", attention="sdpa", reference=CPU_FP32),
    Line("parity-bf16-sdpa", "parity", 60, attention="sdpa", reference=CPU_FP32),
    Line(VARLEN, "parity", 60, attention="varlen", reference=CPU_FP32),
    Line(f"{VARLEN}-again", "parity", 60, attention="varlen", reference=VARLEN),
    Line("twice-fp32-sdpa", "twice", 60, precision="fp32", attention="sdpa"),
    Line("twice-bf16-sdpa", "twice", 60, attention="sdpa"),
    Line("twice-bf16-varlen", "twice", 60, attention="varlen"),
    Line("parity-cpu-bf16-sdpa", "parity", 120, attention="sdpa", on_cpu=True, reference=CPU_FP32),
    Line("syncs-8M", "syncs", 60, micro_batches=2),
    Line("train-650M", "train", 90, size="650M", tokens=16384, micro_batches=4),
    Line("profile-650M", "profile", 90, size="650M", tokens=16384, micro_batches=4),
    Line("train-650M-1024", "train", 60, size="650M", tokens=16384, micro_batches=4, full_length=True),
    Line("hf-650M", "hugging_face", 60, size="650M", tokens=16384, micro_batches=4),
    Line("hf-650M-1024", "hugging_face", 60, size="650M", tokens=16384, micro_batches=4, full_length=True),
    Line(
        "hf-650M-1024-compile",
        "hugging_face",
        120,
        size="650M",
        tokens=16384,
        micro_batches=4,
        full_length=True,
        compiled=True,
    ),
    Line("train-650M-compile", "train", 120, size="650M", tokens=16384, micro_batches=4, compiled=True),
    Line("train-650M-one", "train", 60, size="650M", tokens=16384),
    Line("train-650M-sdpa", "train", 60, size="650M", tokens=16384, micro_batches=2, attention="sdpa"),
    Line("embed-650M-bf16", "embed", 60, size="650M", tokens=16384, micro_batches=4),
    Line("embed-hf-650M-bf16", "embed_hugging_face", 60, size="650M", tokens=16384, micro_batches=4),
    Line("embed-650M-fp32", "embed", 60, size="650M", tokens=16384, micro_batches=4, precision="fp32"),
    Line("train-8M", "train", 60, tokens=65536, micro_batches=2),
    Line("train-35M", "train", 60, size="35M", tokens=65536),
    Line("train-150M", "train", 60, size="150M", tokens=32768, micro_batches=2),
    Line("train-3B-recompute", "train", 120, size="3B", tokens=8192, recompute="full"),
    Line("train-3B", "train", 120, size="3B", tokens=8192),
    Line("train-650M-local", "train", 90, size="650M", tokens=16384, micro_batches=4, layer_spec="local"),
    Line("train-650M-fp8", "train", 120, size="650M", tokens=16384, micro_batches=4, fp8="hybrid"),
    Line("train-3B-fp8", "train", 120, size="3B", tokens=8192, fp8="hybrid"),
)


def choose_lines(beginnings: Sequence[str], reduced: bool) -> list[Line]:
    """Return the lines whose names begin with one of `beginnings`, in the order of `LINES`.

    Args:
        beginnings: Of names; none chooses all lines.
        reduced: Their reduced forms.

    Raises:
        ValueError: No name begins with one of them.
    """
    for beginning in beginnings:
        if not any(line.name.startswith(beginning) for line in LINES):
            names = ", ".join(line.name for line in LINES)
            raise ValueError(f"no line begins with '{beginning}': they are {names}")
    chosen = [line for line in LINES if not beginnings or line.name.startswith(tuple(beginnings))]
    return [line.reduced() if reduced else line for line in chosen]
