"""Computes our settings from values of BioNeMo 1, for the table in `bionemo1`."""

from __future__ import annotations

import shlex
from typing import Any

from esm2mega.config.foreign.rules import (
    Settings,
    Source,
    computed,
    same,
)
from esm2mega.config.foreign.values import (
    ONLY_ADAM,
    Untranslated,
    end_of_hold,
    integer,
    items,
    next_version,
    number,
    one_of,
    ratio,
    text,
    truth,
)

_STORE = "uniref"
"""Names the folder of the token stores that the printed command makes."""

OPTIM = ("model.finetuning_optim", "model.optim")
"""Names the sections of the optimizer: that of a FLIP task, if there is one, else that of pretraining."""


def _finetunes(source: Source) -> bool:
    return source.get("model.data.task_type") is not None


def _in_use(section: str, source: Source) -> bool:
    """Return whether the optimizer of this section is the one that trains."""
    return (section == OPTIM[0]) == _finetunes(source)


def optim(section: str, name: str, ours: str, convert: Any) -> Any:
    """Make the rule for a key of an optimizer, which counts only where it is in use."""

    def turn(value: Any, source: Source) -> Settings:
        return {ours: convert(value)} if _in_use(section, source) else {}

    return computed(f"{section}.{name}", ours, turn, "")


def schedule(section: str) -> list[Any]:
    """Make the rules for the learning rates of an optimizer."""

    def steps(source: Source) -> float:
        found = source.number(f"{section}.sched.max_steps") or source.number("trainer.max_steps")
        return found or 500_000

    def name(value: Any, source: Source) -> Settings:
        if not _in_use(section, source):
            return {}
        warmup = source.number(f"{section}.sched.warmup_steps") or 0
        if value == "WarmupAnnealDecayHold":
            held = source.number(f"{section}.sched.anneal_percentage")
            held = 0.1 if held is None else held
            ends = end_of_hold(warmup, steps(source), held)
            return {"schedule.name": "linear", "schedule.decay_steps": ends, "schedule.min_lr_ratio": held}
        if value in ("WarmupAnnealing", "CosineAnnealing"):
            low, peak = source.number(f"{section}.sched.min_lr") or 0.0, source.number(f"{section}.lr")
            style = "linear" if value == "WarmupAnnealing" else "cosine"
            found: Settings = {"schedule.name": style, "schedule.min_lr_ratio": ratio(low, peak)}
            if source.get("trainer.max_epochs") is None:
                found["schedule.decay_steps"] = int(steps(source))
            return found
        raise Untranslated("schedule.name takes linear, cosine, cosine_plateau or constant")

    def warmup(value: Any, source: Source) -> Settings:
        return {"schedule.warmup_steps": integer(value)} if _in_use(section, source) else {}

    def fraction(value: Any, source: Source) -> Settings:
        if not _in_use(section, source):
            return {}
        share = number(value)
        # A published file of a FLIP task says 10, and means steps.
        return {"schedule.warmup_steps": round(share * steps(source)) if share < 1 else integer(value)}

    return [
        computed(
            f"{section}.sched.name",
            "schedule.name schedule.decay_steps schedule.min_lr_ratio",
            name,
            "`WarmupAnnealDecayHold` falls to `anneal_percentage` of the peak on the line from the end of "
            "the warmup to 0 "
            "at `max_steps`, and stays; that is `linear` with the step at which it gets there. "
            "`WarmupAnnealing` and "
            "`CosineAnnealing` fall to `min_lr` at the end of the run",
        ),
        computed(f"{section}.sched.warmup_steps", "schedule.warmup_steps", warmup, ""),
        computed(
            f"{section}.sched.warmup_ratio",
            "schedule.warmup_steps",
            fraction,
            "below 1 a fraction of the steps, else steps",
        ),
        same(
            " ".join(
                f"{section}.sched.{name}"
                for name in (
                    "min_lr",
                    "max_lr",
                    "max_steps",
                    "anneal_percentage",
                    "last_epoch",
                    "constant_steps",
                )
            ),
            "go into the schedule of `sched.name`; the warmup begins at 0 here",
        ),
        computed(
            f"{section}.name",
            "",
            optimizer,
            ONLY_ADAM,
        ),
    ]


def optimizer(value: Any, source: Source) -> Settings:
    """Accept Adam in any of its forms."""
    if text(value) not in ("adam", "adamw", "fused_adam", "distributed_fused_adam"):
        raise Untranslated(ONLY_ADAM)
    return {}


def interval(value: Any, source: Source) -> Settings:
    """Return the steps between evaluations, at which checkpoints were written too."""
    every = number(value)
    if 0 < every < 1 or text(value) == "1.0":
        raise Untranslated("is a fraction of an epoch; train.eval_every counts steps")
    return {"train.eval_every": integer(value), "checkpoint.save_every": integer(value)}


def task(value: Any, source: Source) -> Settings:
    """Return the kind of a FLIP task, and its head."""
    kinds = {
        "token-level-classification": "token_classification",
        "classification": "classification",
        "regression": "regression",
    }
    kind = one_of(kinds)(value)
    head = "cnn" if kind == "token_classification" else "mlp"
    return {"task.kind": kind, "task.head": head}


def tables(value: Any, source: Source) -> Settings:
    """Name the tables of a FLIP task, one file of each split."""
    if not _finetunes(source):
        return {}
    found: Settings = {}
    for theirs, ours in (("train", "train"), ("val", "valid"), ("test", "test")):
        name = source.get(f"model.data.dataset.{theirs}")
        if name is None:
            continue
        if not isinstance(name, str) or "[" in name:
            raise Untranslated("names several files for a split; join them into one table each")
        found[f"data.{ours}"] = f"{text(value).rstrip('/')}/{theirs}/{name.removesuffix('.csv')}.csv"
    return found


def classes(value: Any, source: Source) -> Settings:
    """Return the number of classes of the one target column."""
    sizes = items(value)
    if source.get("model.data.task_type") == "regression" or len(sizes) > 1:
        return {}
    return {"task.num_classes": integer(sizes[0])}


def mask_column(value: Any) -> Any:
    """Return the column of a mask, or a list of them."""
    names = [None if column in ("null", "~", "") else text(column) for column in items(value)]
    return names[0] if len(names) == 1 else names


def frozen(value: Any, source: Source) -> Settings:
    """Return whether the encoder is trained, unless adapters are."""
    if source.get("model.peft.enabled") and truth(source.get("model.peft.enabled")):
        return {}
    return {"finetune.mode": "frozen" if truth(value) else "full"}


def if_adapters(ours: str, convert: Any) -> Any:
    """Return the turn of a key that counts where adapters are trained."""

    def turn(value: Any, source: Source) -> Settings:
        enabled = source.get("model.peft.enabled")
        return {ours: convert(value)} if enabled and truth(enabled) else {}

    return turn


def adapted_layers(value: Any) -> list[str]:
    """Return the names of the layers that have adapters."""
    # Counted from 1 there, from 0 here.
    return [f"encoder.layers.{integer(layer) - 1}.self_attention.linear_qkv" for layer in items(value)]


def masking(ours: str) -> Any:
    """Return the turn of a fraction of masking, which counts in pretraining."""

    def turn(value: Any, source: Source) -> Settings:
        if _finetunes(source):  # labelled proteins are not masked
            return {}
        return {ours: number(value)}

    return turn


def unchanged(value: Any, source: Source) -> Settings:
    """Check that the fraction left unchanged is what the other two leave."""
    parts = [source.number(f"model.data.{name}_percent") for name in ("mask", "perturb", "identity")]
    if None not in parts and abs(sum(part or 0.0 for part in parts) - 1) > 1e-6:
        raise Untranslated("the three fractions do not add up to 1")
    return {}


def store(split: str) -> Any:
    """Return the turn of an input of UniRef: the store of it that the printed command makes."""

    def turn(value: Any, source: Source) -> Settings:
        train = source.get("model.data.train.uf50_datapath")
        if _finetunes(source) or source.get(f"model.data.{_THEIRS[split]}.custom_pretraining_fasta_path"):
            return {}
        if split != "train" and value == train:
            raise Untranslated("is the training file, which would not measure unseen proteins")
        return {f"data.{split}": f"{_STORE}/{split}"}

    return turn


_THEIRS = {"train": "train", "valid": "val", "test": "test"}


def prepare(source: Source) -> list[str]:
    """Return the command that makes token stores of the UniRef files which a configuration names."""
    train = "model.data.train"
    names = {
        "--uf50": source.get(f"{train}.uf50_datapath"),
        "--uf90": source.get(f"{train}.uf90_datapath"),
        "--mapping": source.get(f"{train}.cluster_mapping_tsv"),
    }
    if _finetunes(source) or None in names.values() or source.get(f"{train}.custom_pretraining_fasta_path"):
        return []
    for option, split in (("--valid", "val"), ("--test", "test")):
        held = source.get(f"model.data.{split}.uf50_datapath")
        if held is not None and held != names["--uf50"]:
            names[option] = held
    for option, name in (("--val-size", "val_size"), ("--test-size", "test_size")):
        if "--valid" not in names and "--test" not in names and source.get(f"model.data.{name}"):
            names[option] = source.get(f"model.data.{name}")
    words = [word for option, path in names.items() for word in (option, str(path))]
    return [f"esm2mega prepare uniref {shlex.join(words)} --out {_STORE}"]


def finish(settings: Settings, source: Source) -> list[str]:
    """Settle what several keys decide together: the schedule, the length, the directory of a new run."""
    remarks = []
    if _finetunes(source) and source.get("model.finetuning_optim.sched.name") is None:
        settings |= {"schedule.name": "constant", "schedule.warmup_steps": 0}
    if "train.max_epochs" in settings and settings.pop("train.max_steps", None) is not None:
        remarks.append("train.max_epochs decides the length of the run; trainer.max_steps is left out")
    if next_version(settings):
        remarks.append("exp_manager.resume_if_exists: every start makes the next directory of run_dir")
    return remarks
