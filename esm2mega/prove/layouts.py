"""Describes a parallel layout for the proof: its name, configuration keys, options, and simpler layouts."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from esm2mega.config.load import load_run
from esm2mega.config.schema import Run
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate
from esm2mega.errors import UserError

PROTEINS_PER_STEP = 12
"""Counts the proteins of a step of the proven training; a micro-batch holds a divisor of this number."""

_DIVISORS = [k for k in range(1, PROTEINS_PER_STEP + 1) if PROTEINS_PER_STEP % k == 0]

TOKENS_PER_PROTEIN = 64
"""Gives the length of the longest protein of the proven training, in tokens; shorter ones leave gaps."""

LAYERS = 5
"""Gives the default depth of the proven model; no pipeline but one of five stages splits it evenly."""


@dataclass(frozen=True)
class Layout:
    """Says how a training is spread over processes; the default is the reference: one process, no packing.

    Attributes:
        tp: Tensor-parallel size.
        pp: Pipeline stages.
        vpp: Pieces per pipeline stage; 1 for the schedule without interleaving.
        dp: Data-parallel size.
        cp: Context-parallel size.
        exchange: How context-parallel ranks attend, as `parallel.context_parallel_exchange`.
        sp: Whether sequence parallelism is on.
        packed: Number of proteins in one micro-batch.
        distributed_optimizer: Whether the optimizer state is sharded over the data-parallel processes.
        recompute: Activations that are computed again in the backward pass.
        layers: Number of layers; each number is another training, with a reference of its own.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    cp: int = 1
    exchange: str = "auto"
    sp: bool = False
    packed: int = 1
    distributed_optimizer: bool = False
    recompute: str = "none"
    layers: int = LAYERS

    @property
    def processes(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def reference(self) -> Layout:
        """Return the layout of the training that a training of this layout must equal."""
        return Layout(layers=self.layers)

    def __str__(self) -> str:
        """Write the layout as in ``TP2 PP2 SP, 3 per pack``."""
        sizes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "DP": self.dp, "CP": self.cp}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        words += ["SP"] * self.sp + ["DO"] * self.distributed_optimizer
        extras = [f"by {self.exchange}"] * (self.exchange != "auto")
        extras += [f"{self.packed} per pack"] * (self.packed > 1)
        extras += [f"recompute {self.recompute}"] * (self.recompute != "none")
        extras += [f"{self.layers} layers"] * (self.layers != LAYERS)
        return ", ".join([" ".join(words) or "1 process", *extras])

    def _values(self) -> dict[str, Any]:
        """Return configuration key -> value."""
        return {
            "model.num_layers": self.layers,
            "model.recompute": self.recompute,
            "parallel.tensor_model_parallel_size": self.tp,
            "parallel.pipeline_model_parallel_size": self.pp,
            "parallel.virtual_pipeline_model_parallel_size": None if self.vpp == 1 else self.vpp,
            "parallel.context_parallel_size": self.cp,
            "parallel.context_parallel_exchange": self.exchange,
            "parallel.sequence_parallel": self.sp,
            "parallel.distributed_optimizer": self.distributed_optimizer,
            "train.micro_batch_tokens": self.packed * TOKENS_PER_PROTEIN,
            "train.global_batch_tokens": PROTEINS_PER_STEP * TOKENS_PER_PROTEIN,
        }

    def settings(self) -> list[str]:
        """Return the overrides that make a run of this layout."""
        return [f"{key}={json.dumps(value)}" for key, value in self._values().items()]

    def options(self) -> list[str]:
        """Return the options of ``esm2mega prove`` that ask for this layout."""
        words: list[str] = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value != entry.default:
                words.append(f"--{entry.name.replace('_', '-')}")
                words += [] if value is True else [str(value)]
        return words

    def check(self, training: Sequence[str]) -> None:
        """Raise `UserError` if the rules of the configuration refuse the layout for a training.

        Args:
            training: Overrides of the training.
        """
        run = copy.deepcopy(_loaded(tuple(training)))
        for key, value in self._values().items():
            section, _, name = key.partition(".")
            setattr(getattr(run, section), name, value)
        validate(run, self.processes)
        if run.task.kind is not None:
            validate_task(run)

    def simpler(self) -> Iterator[Layout]:
        """Yield layouts with one axis nearer to the reference, the largest steps first."""
        plain = Layout()
        changes: list[dict[str, Any]] = []
        for name, value in vars(self).items():
            if (default := getattr(plain, name)) != value:
                changes.append({name: default})
            if name in ("tp", "pp", "vpp", "dp", "cp", "packed"):
                changes += [{name: between} for between in range(2, value)]
        if self.vpp > 1 and self.layers != self.pp * self.vpp:
            changes.append({"layers": self.pp * self.vpp})
        for change in changes:
            layout = replace(self, **change)
            if self.vpp > 1 and change.keys() & {"pp", "vpp"}:
                # An interleaved pipeline needs a depth that its pieces divide; any other has the default.
                layout = replace(layout, layers=layout.pp * layout.vpp if layout.vpp > 1 else LAYERS)
            yield layout


@functools.cache
def _loaded(training: tuple[str, ...]) -> Run:
    """Load the configuration of the reference, once, since loading takes longer than all checks."""
    return load_run(None, [*training, *Layout().settings()])


def layout_from_options(chosen: dict[str, Any], training: Sequence[str]) -> Layout:
    """Make the layout that options of ``esm2mega prove`` ask for.

    Args:
        chosen: Options that were given, by the names of `Layout`; ``packed`` is text, and ``auto`` for the
            smallest number above 1 that fits.
        training: Overrides of the training.

    Raises:
        UserError: The rules of the configuration refuse the layout.
    """
    axes = dict(chosen)
    packed = axes.pop("packed", "1")
    if "vpp" in axes:
        axes.setdefault("layers", axes.get("pp", 1) * axes["vpp"])
    tried = [Layout(packed=k, **axes) for k in (_DIVISORS[1:] if packed == "auto" else [int(packed)])]
    layout = next((layout for layout in tried if is_possible(layout, training)), tried[0])
    layout.check(training)
    return layout


def random_layouts(count: int, seed: int, processes: int, training: Sequence[str]) -> list[Layout]:
    """Draw `count` different layouts within a limit of processes, the same for the same seed.

    Raises:
        UserError: So many different layouts were not found.
    """
    rng = random.Random(seed)
    found: dict[Layout, None] = {}
    for _ in range(1000 + 100 * count):
        layout = _draw(rng, processes)
        if layout == layout.reference or layout.processes > processes or layout in found:
            continue
        if is_possible(layout, training):
            found[layout] = None
            if len(found) == count:
                return list(found)
    raise UserError(
        f"--layouts random:{count}: only {len(found)} different layouts found with "
        f"--processes {processes}; ask for fewer"
    )


def is_possible(layout: Layout, training: Sequence[str]) -> bool:
    """Return whether the rules of the configuration allow the layout for a training."""
    try:
        layout.check(training)
    except UserError:
        return False
    return True


def _draw(rng: random.Random, processes: int) -> Layout:
    """Draw a layout; most impossible ones are avoided, and `is_possible` refuses the rest."""
    tp, pp = rng.choice([1, 2, 4]), rng.randint(1, 4)
    cp = rng.choice([1, 1, 2, 3, 4])
    dp = rng.randint(1, max(1, min(4, processes // (tp * pp * cp))))
    vpp = rng.choice([1, 1, 2, 3]) if pp > 1 else 1
    return Layout(
        tp=tp,
        pp=pp,
        vpp=vpp,
        dp=dp,
        cp=cp,
        exchange=rng.choice(["auto", "heads", "needed", "gather"]) if cp > 1 else "auto",
        sp=tp > 1 and rng.random() < 0.5,
        packed=rng.choice([k for k in _DIVISORS if PROTEINS_PER_STEP % (k * dp) == 0]),
        distributed_optimizer=rng.random() < 0.5,
        recompute=rng.choice(["none", "selective", "full"]),
        layers=pp * vpp if vpp > 1 else rng.choice([4, 5, 6]),
    )
