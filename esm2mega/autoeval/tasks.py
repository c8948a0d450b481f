"""Names the tasks and suites of `autoeval`, and the modes that are defined for each.

This module imports nothing heavy, so that the command line can refuse a name at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from esm2mega.config.task import PAIR_KIND
from esm2mega.data.benchmarks.names import FLIP_TASKS, TAPE_TASKS
from esm2mega.errors import UserError

PROBE, FINETUNE, LORA, ZERO_SHOT = "probe", "finetune", "lora", "zero-shot"
MODES = (PROBE, FINETUNE, LORA, ZERO_SHOT)
"""Lists the modes in the order in which they are shown."""

LIMITS = {"train": "--limit-train", "valid": "--limit-valid", "test": "--limit-test"}
"""Names the options that limit the proteins of each split."""

QUICK = "quick"
QUICK_LIMITS = {"train": 500, "valid": 200, "test": 200}
"""Gives the most proteins of each split in the suite `quick`."""

LAYOUT = "parallel."
"""Begins the keys that say how processes share the work, in every mode."""

_OWN_KEYS = frozenset(
    {"init_from", "run_dir", "seed", "data.train", "data.valid", "data.test", "task.kind"}
    | {"task.target_columns", "task.mask_column"}
)
"""Lists the keys of a fine-tuning by which a task and a model are given to it."""

PROTEINGYM, GB1, CONTACTS = "proteingym", "gb1", "contacts"
_GB1_DOMAIN = 62
"""Is the number of residues of gb1's proteins that are kept: the domain; the tag behind it never varies."""
_CONTACTS = "contact_prediction"
_HEADLINE_SPLITS = {"remote_homology": "test_fold_holdout", "secondary_structure": "cb513"}
_LABELS = {"locations": "multilabel", "membrane": "classification"}


@dataclass(frozen=True)
class EvalTask:
    """Describes one task of `autoeval`.

    Attributes:
        name: Its full name, such as ``flip/gb1:two_vs_rest``.
        family: ``flip``, ``tape``, ``deeploc2``, ``proteingym`` or ``contacts``.
        task: Its name in that family.
        split: The split of FLIP, the test split of TAPE, or the labels of DeepLoc 2.
        kind: The value of `task.kind`; None for ProteinGym, which has no labelled proteins.
        limits: Most proteins of each split; empty for all.
    """

    name: str
    family: str
    task: str
    split: str
    kind: str | None
    limits: tuple[tuple[str, int], ...] = ()

    @property
    def slug(self) -> str:
        """Return the name as a file name."""
        return self.name.replace("/", "-").replace(":", "-")

    @property
    def first_residues(self) -> int | None:
        """Return how many residues of each protein are kept; None for all."""
        return _GB1_DOMAIN if self.task == GB1 else None

    @property
    def modes(self) -> tuple[str, ...]:
        """Return the modes that are defined for the task."""
        if not self.has_training:
            return (ZERO_SHOT,)
        if self.kind == PAIR_KIND:
            return (FINETUNE, LORA, ZERO_SHOT)
        return (*((PROBE, FINETUNE, LORA)), *((ZERO_SHOT,) * (self.task == GB1)))

    @property
    def has_training(self) -> bool:
        """Return whether there are proteins to train on, and not for a test alone."""
        return self.family not in (PROTEINGYM, CONTACTS)

    @property
    def why_no_zero_shot(self) -> str:
        """Say which tasks have a zero-shot mode."""
        return (
            "zero-shot is for variants of one protein whose wild type is known, flip/gb1 and proteingym, and "
            "for contacts"
        )


def _flip(task: str, split: str | None, limits: tuple[tuple[str, int], ...] = ()) -> EvalTask:
    described = FLIP_TASKS[task]
    split = split or described.default
    if split not in described.splits:
        raise UserError(
            f"--tasks flip/{task}:{split}: {task} has the splits {', '.join(described.splits)}; name one"
        )
    return EvalTask(f"flip/{task}:{split}", "flip", task, split, described.kind_of(split), limits)


def _tape(task: str, split: str | None) -> EvalTask:
    described = TAPE_TASKS[task]
    tests = described.splits[2:]
    split = split or _HEADLINE_SPLITS.get(task.removesuffix("_8"), tests[0])
    if split not in tests:
        raise UserError(
            f"--tasks tape/{task}:{split}: {task} has the test splits {', '.join(tests)}; name one"
        )
    return EvalTask(f"tape/{task}:{split}", "tape", task, split, described.kind)


def _deeploc2(labels: str | None) -> EvalTask:
    labels = labels or "locations"
    if labels not in _LABELS:
        raise UserError(f"--tasks deeploc2:{labels}: DeepLoc 2 has the labels {', '.join(_LABELS)}; name one")
    return EvalTask(f"deeploc2:{labels}", "deeploc2", "deeploc2", labels, _LABELS[labels])


def suites(source: str) -> dict[str, list[EvalTask]]:
    """Return the tasks of each suite.

    Args:
        source: Folder of the published files, which may have a folder `CONTACTS` of the user's own.
    """
    limits = tuple(QUICK_LIMITS.items())
    is_own = (Path(source) / CONTACTS).is_dir()
    return {
        "flip": [_flip(task, None) for task in FLIP_TASKS],
        "tape": [
            # Contacts are a suite of their own, since they have no probe, which is the mode by default.
            *(_tape(task, None) for task in TAPE_TASKS if task not in ("remote_homology", _CONTACTS)),
            *(_tape("remote_homology", split) for split in TAPE_TASKS["remote_homology"].splits[2:]),
        ],
        QUICK: [_flip("gb1", "two_vs_rest", limits), _flip("secondary_structure", None, limits)],
        CONTACTS: [EvalTask(*(CONTACTS,) * 3, "", PAIR_KIND) if is_own else _tape(_CONTACTS, None)],
    }


def parse_tasks(names: Sequence[str], source: str) -> list[EvalTask]:
    """Return the tasks that names of tasks and suites mean, each once.

    Args:
        names: The names.
        source: As for `suites`.

    Raises:
        UserError: There is no such task or split, or none is named.
    """
    found: dict[str, EvalTask] = {}
    known = suites(source)
    for name in names:
        for task in known.get(name) or [_parse(name, known)]:
            if (other := found.setdefault(task.name, task)) != task:
                raise UserError(f"--tasks names {other.name} with and without limits; leave one of them out")
    if not found:
        raise UserError(f"--tasks is empty; name tasks such as flip/gb1, or suites: {', '.join(known)}")
    return list(found.values())


def _parse(name: str, known: Iterable[str]) -> EvalTask:
    path, _, split = name.partition(":")
    family, _, task = path.partition("/")
    if family == "flip" and task in FLIP_TASKS:
        return _flip(task, split or None)
    if family == "tape" and task in TAPE_TASKS:
        return _tape(task, split or None)
    if path == "deeploc2":
        return _deeploc2(split or None)
    if name == PROTEINGYM:
        return EvalTask(PROTEINGYM, PROTEINGYM, PROTEINGYM, "", None)
    tasks = [*(f"flip/{task}" for task in FLIP_TASKS), *(f"tape/{task}" for task in TAPE_TASKS)]
    raise UserError(
        f"--tasks {name}: is none of {', '.join([*tasks, 'deeploc2', PROTEINGYM])}, nor of the suites "
        f"{', '.join(known)}; a split follows a colon, as in flip/gb1:sampled"
    )


def check_modes(tasks: Sequence[EvalTask], modes: Sequence[str]) -> None:
    """Refuse a mode that is not defined for one of the tasks.

    Raises:
        UserError: It is not, or there is none.
    """
    if not modes:
        raise UserError(f"--mode is empty; name some of {', '.join(MODES)}")
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"--mode {mode}: is none of {', '.join(MODES)}; name some of them")
        for task in tasks:
            if mode not in task.modes:
                reason = f"; {task.why_no_zero_shot}" if mode == ZERO_SHOT else ""
                raise UserError(
                    f"--mode {mode}: is not defined for {task.name}, which has "
                    f"{', '.join(task.modes)}{reason}"
                )


def check_options(
    tasks: Sequence[EvalTask],
    modes: Sequence[str],
    layers: Sequence[str],
    limits: Iterable[str],
    overrides: Sequence[str],
) -> None:
    """Refuse what the user sets and none of the modes or tasks would read.

    Args:
        tasks: The tasks.
        modes: The modes.
        layers: Values of ``--layers``.
        limits: Splits that have a limit.
        overrides: ``key=value``.

    Raises:
        UserError: There is such an option.
    """
    asked = ",".join(modes)
    if layers and PROBE not in modes:
        raise UserError(
            f"--layers {','.join(layers)}: is for probes, and not for --mode {asked}; leave it out"
        )
    if own := next((word for word in overrides if word.partition("=")[0] in _OWN_KEYS), None):
        raise UserError(f"{own}: is set for each model and task; leave it out (seeds are --seed and --seeds)")
    tuned = [word for word in overrides if not word.startswith(LAYOUT)]
    if tuned and not {FINETUNE, LORA}.intersection(modes):
        raise UserError(
            f"{tuned[0]}: changes the fine-tuning, and not --mode {asked}; leave it out, or name {FINETUNE} "
            f"or {LORA} (the keys of {LAYOUT}* hold for every mode)"
        )
    for split in limits:
        if unsplit := next((task.name for task in tasks if not task.has_training), None):
            raise UserError(
                f"{LIMITS[split]}: {unsplit} has no splits; leave it out, or evaluate {unsplit} by itself"
            )
