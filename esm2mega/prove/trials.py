"""Lists the trials that are proven, in the groups that ``--layouts`` names.

A feature that changes the training (another head, adapters) is proven by a group of its own here, whose
trials hold the overrides that switch it on.
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from esm2mega.errors import UserError
from esm2mega.prove.heads import ADAPTABLE, CODE, HEADS
from esm2mega.prove.layouts import TOKENS_PER_PROTEIN, Layout, is_possible
from esm2mega.prove.training import MID_WINDOW, MIXED, SETTINGS


@dataclass(frozen=True)
class Trial:
    """Describes one row of the table.

    Attributes:
        layouts: One layout; or two, if the run is stopped at the first and resumed at the second.
        precision: ``fp64``; or ``bf16`` or ``fp16``, which are compared with fp32.
        settings: Further overrides, which the reference has too.
        label: Name of the training that the settings make; empty for the plain one and for a plain resume.
        continues: Whether the trial starts from the weights that the training without `settings` ends with.
        code: Model, head and loss of a user's own, as the option ``--code`` names them; empty for none.
        through: Format to which the trained model is converted, and back; empty for none.
    """

    layouts: tuple[Layout, ...]
    precision: str = "fp64"
    settings: tuple[str, ...] = ()
    label: str = ""
    continues: bool = False
    code: str = ""
    through: str = ""

    @property
    def training(self) -> list[str]:
        """Return the overrides of the training with which a layout must be possible."""
        return [*SETTINGS, *(() if self.continues else self.settings)]

    @property
    def is_half(self) -> bool:
        return self.precision in ("bf16", "fp16")

    @property
    def processes(self) -> int:
        return max(layout.processes for layout in self.layouts)

    def __str__(self) -> str:
        there = f"to {self.through} and back" if self.through else ""
        words = [" -> ".join(map(str, self.layouts)), self.label, there, self.precision.replace("fp64", "")]
        return ", ".join(filter(None, words))

    def command(self, seed: int) -> str:
        """Return the command that repeats the trial: by options, or by name where they do not say all."""
        options = ["--row", str(self)]
        words = self.label.split(", ") if self.label else []
        heads = [word.removeprefix(_HEAD) for word in words if word.startswith(_HEAD)]
        if len(self.layouts) == 1 and not self.through and len(words) == len(heads) + (_LORA in words):
            options = [*self.layouts[0].options(), *["--lora"] * (_LORA in words)]
            options += ["--head", *heads] if heads else []
            options += ["--precision", self.precision] if self.precision != "fp64" else []
        return shlex.join(["esm2mega", "prove", *options, "--seed", str(seed)])


_LORA, _HEAD = "LoRA", "head "

LORA = (
    "lora.rank=3",
    "lora.alpha=8",
    "lora.dropout=0.2",
    "lora.target_modules=[linear_qkv,linear_proj,linear_fc1,linear_fc2]",
)
"""Switches on adapters of every linear layer, with dropout."""

_DORA = (*LORA, "lora.target_modules=[all-linear]", "lora.use_dora=true", "lora.use_rslora=true")
_SOME = (
    "lora.rank=5",
    "lora.dropout=0.1",
    "lora.target_modules=['*.[123].*.linear_q','*.[12].*.linear_fc?','*.3.*.linear_v',lm_head.dense]",
    "lora.bias=all",
)


def with_lora(trial: Trial) -> Trial:
    """Return a trial that trains adapters instead of all weights; a fine-tuning keeps its head.

    Raises:
        UserError: The settings of the head decide already what is trained.
    """
    has_task = any(setting.startswith("task.kind=") for setting in trial.settings)
    mode = ("finetune.mode=lora",) if has_task else ()
    if any(setting.startswith("finetune.") for setting in trial.settings):
        raise UserError(
            f"--{trial.label} and --lora exclude each other; choose one of {', '.join(ADAPTABLE)}"
        )
    label = ", ".join(filter(None, (trial.label, _LORA)))
    return replace(trial, settings=(*trial.settings, *LORA, *mode), label=label, continues=True)


def with_head(trial: Trial, head: str) -> Trial:
    """Return a trial that fine-tunes with a head at the same layout.

    Raises:
        UserError: There is no such head.
    """
    if head not in HEADS:
        raise UserError(f"--head {head} is not one of {', '.join(HEADS)}")
    settings = (*trial.settings, *HEADS[head])
    return replace(trial, settings=settings, label=f"{_HEAD}{head}", code=CODE.get(head, ""))


def drawn_training(layout: Layout, rng: random.Random, heads: Sequence[str]) -> Trial:
    """Draw a training that a layout allows: of the language model, of a head, and of either with adapters.

    Args:
        layout: Layout of the trial.
        rng: Source of random numbers.
        heads: Names of the heads to draw from.
    """
    trial, head = Trial((layout,)), rng.choice([*[None] * len(heads), *heads] or [None])
    if head is not None and is_possible(layout, with_head(trial, head).training):
        trial = with_head(trial, head)
    has_lora = rng.random() < 1 / 3
    return with_lora(trial) if has_lora and (head is None or head in ADAPTABLE) else trial


_ONE = Layout()
_TP2 = Layout(tp=2)
_PP2 = Layout(pp=2)
_TP2_PP2 = Layout(tp=2, pp=2)
_DP2 = Layout(dp=2, distributed_optimizer=True)
_TP2_SP = Layout(tp=2, sp=True)
_DP3_DP4 = (Layout(dp=3, distributed_optimizer=True), Layout(dp=4, distributed_optimizer=True))
_ONE4, _VPP2 = Layout(layers=4), Layout(pp=2, vpp=2, layers=4)

_CI = (
    Layout(packed=12),
    Layout(tp=2, packed=3),
    Layout(tp=4, packed=4, recompute="selective"),
    Layout(tp=2, sp=True, packed=2, recompute="full"),
    Layout(pp=2, packed=4, recompute="full"),
    Layout(pp=3, packed=2),
    Layout(pp=4, recompute="selective"),
    Layout(pp=2, vpp=2, packed=3, layers=4),
    Layout(tp=2, pp=2, sp=True, packed=3),
    Layout(dp=2, packed=3, distributed_optimizer=True),
    Layout(dp=3, packed=2),
    Layout(tp=2, dp=2, sp=True, packed=2, distributed_optimizer=True),
)

_MORE = (
    Layout(tp=4, sp=True, packed=6, recompute="full"),
    Layout(pp=3, vpp=2, packed=2, layers=6),
    Layout(pp=4, vpp=2, packed=3, layers=8),
    Layout(pp=2, vpp=3, packed=2, layers=6, recompute="full"),
    Layout(tp=2, pp=2, vpp=2, sp=True, packed=2, layers=4),
    Layout(pp=2, dp=2, packed=2, distributed_optimizer=True),
    Layout(pp=2, vpp=2, dp=2, packed=3, layers=4, distributed_optimizer=True),
    Layout(dp=4, packed=3),
    Layout(dp=4, packed=3, distributed_optimizer=True),
    Layout(tp=2, dp=2, recompute="selective"),
)

_HEADS_AT = (
    Layout(tp=2, packed=3),
    Layout(tp=2, sp=True, packed=2),
    Layout(pp=2, packed=4),
    Layout(dp=2, packed=3, distributed_optimizer=True),
)


def _heads_at_all(heads: Iterable[str]) -> list[Trial]:
    return [with_head(Trial((layout,)), head) for head in heads for layout in _HEADS_AT]


_PAIRS = (
    (_ONE, _TP2),
    (_TP2, _PP2),
    (_TP2_PP2, _DP2),
    (_DP2, _TP2_SP),
    (Layout(pp=2, dp=2, distributed_optimizer=True), Layout(dp=4, distributed_optimizer=True)),
    (_ONE4, _VPP2),
    (_VPP2, replace(_DP2, layers=4)),
    (Layout(packed=3), Layout(tp=2, packed=3)),
    (replace(_DP2, packed=2), replace(_PP2, packed=2)),
)
# These resume main weights that are kept beside the model's, from whole to sharded ones and back.
_FEW = ("finetune.mode=frozen", "task.head=linear")
_BF16_PAIRS = ((_TP2, _DP2), (_DP2, _PP2))

_FP16 = (
    Layout(tp=2, sp=True, packed=3),
    Layout(pp=2, packed=4, recompute="full"),
    Layout(dp=2, packed=2, distributed_optimizer=True),
)

_POSITIONS = f"model.max_positions={TOKENS_PER_PROTEIN}"
_PRE_LN, _POST_LN = "model.family=proteinbert_preln", "model.family=proteinbert_postln"
_NO_FINAL = ("pre-LN, no final LayerNorm", (_PRE_LN, _POSITIONS, "model.final_layernorm=false"))
_FAMILIES: tuple[tuple[str, tuple[str, ...], Layout], ...] = (
    ("post-LN", (_POST_LN, _POSITIONS), Layout(tp=2, packed=3)),
    ("post-LN", (_POST_LN, _POSITIONS), Layout(pp=2, packed=2)),
    ("post-LN", (_POST_LN, _POSITIONS), Layout(tp=2, pp=2, sp=True)),
    (
        "post-LN",
        (_POST_LN, _POSITIONS),
        Layout(dp=2, packed=3, distributed_optimizer=True, recompute="full"),
    ),
    ("pre-LN", (_PRE_LN, _POSITIONS), Layout(tp=2, sp=True, packed=3)),
    ("pre-LN", (_PRE_LN, _POSITIONS), Layout(pp=2, packed=2)),
    ("pre-LN", (_PRE_LN, _POSITIONS), Layout(tp=2, pp=2, packed=2)),
    (*_NO_FINAL, Layout(tp=2, pp=2)),
)

# Two families, split over tensors, stages and data, and a head, which only the last stage has.
_EXPORTS = (
    Trial((Layout(tp=2, pp=2, packed=2),), settings=_NO_FINAL[1], label=_NO_FINAL[0], through="proteinlm"),
    Trial((Layout(tp=2, dp=2, packed=2),), settings=(_POST_LN, _POSITIONS), label="post-LN", through="tape"),
    Trial(
        (Layout(pp=2, dp=2, packed=2),),
        settings=(*_NO_FINAL[1], *HEADS["tape"][:-1], "task.head=proteinlm"),
        label=f"{_NO_FINAL[0]}, {_HEAD}proteinlm",
        through="proteinlm",
    ),
)

_ADAPTED: tuple[tuple[str, tuple[str, ...], tuple[Layout, ...]], ...] = (
    (_LORA, LORA, (Layout(packed=12),)),
    (_LORA, LORA, (Layout(tp=2, packed=3),)),
    (_LORA, LORA, (Layout(pp=2, packed=2, recompute="full"),)),
    (_LORA, LORA, (Layout(tp=2, sp=True, recompute="full"),)),
    (_LORA, LORA, (Layout(dp=2, packed=2, distributed_optimizer=True),)),
    (_LORA, LORA, (Layout(tp=2, pp=2, packed=3),)),
    (_LORA, LORA, (Layout(pp=2, vpp=2, packed=3, layers=4),)),
    ("DoRA", _DORA, (Layout(tp=2, packed=2),)),
    ("DoRA", _DORA, (Layout(tp=2, sp=True, dp=2),)),
    ("DoRA", _DORA, (Layout(tp=4, sp=True, packed=4, recompute="selective"),)),
    ("LoRA of some linears", _SOME, (Layout(tp=2, pp=2, sp=True, packed=2),)),
    ("LoRA of some linears", _SOME, (Layout(pp=2, vpp=2, packed=2, layers=4, recompute="full"),)),
    (_LORA, LORA, (_TP2, _DP2)),
    ("DoRA", _DORA, (_PP2, _TP2_SP)),
)

DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.2")
"""Switches on the dropout of the encoder."""

_DROPPING: tuple[tuple[str, tuple[str, ...], tuple[Layout, ...]], ...] = (
    ("dropout", DROPOUT, (Layout(packed=12),)),
    ("dropout", DROPOUT, (Layout(tp=2, packed=3),)),
    ("dropout", DROPOUT, (Layout(tp=4, sp=True, packed=4, recompute="selective"),)),
    ("dropout", DROPOUT, (Layout(pp=2, packed=2, recompute="full"),)),
    ("dropout", DROPOUT, (Layout(pp=2, vpp=2, packed=3, layers=4),)),
    ("dropout", DROPOUT, (Layout(dp=2, packed=3, distributed_optimizer=True),)),
    ("dropout", DROPOUT, (Layout(tp=2, pp=2, sp=True, packed=3, recompute="full"),)),
    ("hidden dropout", DROPOUT[:1], (Layout(tp=2, packed=2, recompute="selective"),)),
    ("attention dropout", DROPOUT[1:], (Layout(tp=2, sp=True, packed=2),)),
    ("pre-LN, dropout", (_PRE_LN, _POSITIONS, *DROPOUT), (Layout(tp=2, pp=2, sp=True, packed=3),)),
    ("post-LN, dropout", (_POST_LN, _POSITIONS, *DROPOUT), (Layout(tp=2, pp=2, sp=True, packed=3),)),
    ("dropout", (*DROPOUT, *MID_WINDOW), (_TP2, _DP2)),
    ("dropout", (*DROPOUT, *MID_WINDOW), (replace(_DP2, packed=2), replace(_PP2, packed=2))),
)

_CONTEXT = (
    Layout(cp=2, packed=3),
    Layout(cp=4, packed=2, recompute="full"),
    # One protein per pack, so that some parts are padding alone, and have no labels.
    Layout(cp=4, exchange="needed"),
    Layout(cp=3, packed=6, exchange="gather", recompute="selective"),
    Layout(tp=2, cp=2, sp=True, packed=3, recompute="full"),
    # Two of six heads each, for three processes; and by needed, since 4 does not divide 6.
    Layout(tp=2, cp=3, packed=3, recompute="selective"),
    Layout(tp=2, cp=4, sp=True, packed=2),
    Layout(pp=2, cp=2, packed=4),
    Layout(pp=2, vpp=2, cp=2, packed=3, layers=4, exchange="needed"),
    Layout(cp=2, dp=2, packed=3, distributed_optimizer=True),
    Layout(cp=2, dp=3, packed=2, exchange="needed", distributed_optimizer=True),
)
_LONG_AND_SHORT = (
    *(Layout(cp=4, packed=12, exchange=exchange) for exchange in ("heads", "needed", "gather")),
    Layout(tp=2, cp=2, sp=True, packed=12, exchange="needed", recompute="full"),
)
_CONTEXT_PAIRS = (
    (Layout(cp=2, packed=3), Layout(dp=2, packed=3, distributed_optimizer=True)),
    (Layout(tp=2, packed=2), Layout(cp=4, packed=2, exchange="needed")),
    (Layout(cp=2, dp=2, packed=3, distributed_optimizer=True), Layout(pp=2, cp=2, packed=3)),
)
_CONTEXT_HEADS = (Layout(cp=2, packed=3), Layout(cp=2, packed=2, exchange="needed"))
_CONTEXT_DROPPING = (Layout(cp=2, packed=3), Layout(tp=2, cp=2, sp=True, packed=3, exchange="needed"))


def _in_parts() -> list[Trial]:
    """Return the trials of context parallelism."""
    plain = [Trial((layout,)) for layout in _CONTEXT]
    mixed = [Trial((layout,), settings=MIXED, label="long and short") for layout in _LONG_AND_SHORT]
    resumed = [Trial(pair, settings=MID_WINDOW) for pair in _CONTEXT_PAIRS]
    heads = [with_head(Trial((_CONTEXT_HEADS[number % 2],)), head) for number, head in enumerate(HEADS)]
    # Their stages have parts of a head each.
    heads += [
        with_head(Trial((Layout(pp=2, cp=2, packed=4),)), head) for head in ("frozen", "attention_maps")
    ]
    adapted = [with_lora(Trial((layout,))) for layout in _CONTEXT_DROPPING]
    adapted.append(with_lora(with_head(Trial((Layout(cp=2, packed=2),)), "product")))
    dropping = [Trial((layout,), settings=DROPOUT, label="dropout") for layout in _CONTEXT_DROPPING]
    others = [
        Trial((Layout(cp=2, packed=3),), "bf16"),
        Trial((Layout(cp=2, packed=3),), settings=(_POST_LN, _POSITIONS), label="post-LN"),
    ]
    return [*plain, *mixed, *resumed, *heads, *adapted, *dropping, *others]


# These have pipeline stages whose groups of parameters differ, and a resume.
_HEADS_AND_LORA = (
    with_lora(with_head(Trial((Layout(pp=2, dp=2, packed=2, distributed_optimizer=True),)), "mlp")),
    with_lora(with_head(Trial((_TP2, _DP2), settings=MID_WINDOW), "attention")),
)


def _dropping(trial: Trial) -> Trial:
    """Return a trial with dropout in its encoder."""
    return replace(trial, settings=(*trial.settings, *DROPOUT), label=f"{trial.label}, dropout")


GROUPS: dict[str, tuple[Trial, ...]] = {
    "ci": tuple(Trial((layout,)) for layout in _CI),
    "more": tuple(Trial((layout,)) for layout in _MORE),
    "resume": (
        *(Trial(pair, settings=MID_WINDOW) for there in _PAIRS for pair in (there, there[::-1])),
        *(Trial(pair, "bf16", MID_WINDOW) for pair in _BF16_PAIRS),
    ),
    "heads": (
        *_heads_at_all(HEADS),
        # This has groups of parameters by learning rate, in sharded and in whole optimizer state.
        with_head(Trial((_DP2, _TP2), settings=MID_WINDOW), "freeze"),
        with_head(Trial((_TP2, _PP2), settings=MID_WINDOW), "own"),
        # So few weights are trained that some ranks hold none of their optimizer state.
        *(
            with_head(Trial(pair, settings=(*MID_WINDOW, *_FEW)), "max")
            for pair in (_DP3_DP4, _DP3_DP4[::-1])
        ),
    ),
    "bf16": (
        *(Trial((layout,), "bf16") for layout in _CI if layout.processes > 1),
        # Sums in fp32 travel beside states in bf16.
        with_head(Trial((Layout(pp=2, packed=4),), "bf16"), "attention_maps"),
        # Main weights are kept beside what is trained; what is frozen has none. From whole to sharded ones.
        with_lora(Trial(_BF16_PAIRS[0], "bf16", MID_WINDOW)),
        with_head(Trial(_BF16_PAIRS[0], "bf16", MID_WINDOW), "frozen"),
    ),
    # The second sends gradients that are multiplied by the loss scale from stage to stage.
    "fp16": (
        *(Trial((layout,), "fp16") for layout in _FP16),
        Trial((_TP2, _DP2), "fp16", MID_WINDOW),
    ),
    "families": tuple(
        Trial((layout,), settings=settings, label=label) for label, settings, layout in _FAMILIES
    ),
    "exports": _EXPORTS,
    "lora": tuple(
        Trial(layouts, "fp64", (*settings, *MID_WINDOW) if len(layouts) > 1 else settings, label, True)
        for label, settings, layouts in _ADAPTED
    ),
    "lora-heads": (
        *map(with_lora, _heads_at_all(ADAPTABLE)),
        *_HEADS_AND_LORA,
    ),
    "dropout": (
        *(Trial(layouts, settings=settings, label=label) for label, settings, layouts in _DROPPING),
        # The dropout of a head lies beside that of the encoder.
        *(_dropping(with_head(Trial((_HEADS_AT[n],)), head)) for n, head in ((1, "residue"), (2, "mlp"))),
        _dropping(with_lora(Trial((Layout(tp=2, sp=True, packed=2, recompute="full"),)))),
    ),
    "cp": tuple(_in_parts()),
}
"""Maps each name that ``--layouts`` takes to its trials; ``all``, the default, takes every group."""
