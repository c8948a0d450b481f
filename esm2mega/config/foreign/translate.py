"""Translates a file of an earlier system into a configuration, and lists all that it could not.

Nothing of the file is lost without a word: each key is translated, or done elsewhere, or needs nothing, or is
listed with the reason.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esm2mega.config.architecture import FROM
from esm2mega.config.batches import processes_of_a_replica
from esm2mega.config.foreign.reading import Foreign, read_foreign
from esm2mega.config.foreign.rules import Rule, Settings, Source
from esm2mega.config.foreign.values import Untranslated, shaped
from esm2mega.config.keys import known_keys
from esm2mega.config.load import load_run, load_run_over, value_checker
from esm2mega.config.presets import ModelShape
from esm2mega.config.scalars import Unset, shown, written
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate
from esm2mega.errors import UserError
from esm2mega.files import OTHER_OUT, refuse_compressed, refuse_existing, replacing
from esm2mega.version import __version__

_INDENT = "  "


@dataclass
class Translation:
    """Holds what became of a file of another system.

    Attributes:
        foreign: The file.
        settings: Our settings by dotted key.
        origins: What each was made of: their key, or what that system did without one.
        untranslated: Keys without a counterpart, each with its place, value and reason.
        elsewhere: Keys for what is done by a command or a launcher, in the same form.
        needless: Keys that say what esm2mega does anyway.
        processes: Number of processes that the file asks for.
        commands: Commands that prepare the data.
        remarks: What else the user should know.
        check: Refuses a value that a key of ours does not take.
    """

    foreign: Foreign
    settings: Settings = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    untranslated: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)
    processes: int = 1
    commands: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    check: Callable[[str, object, str], None] = field(default_factory=value_checker)

    @property
    def finetunes(self) -> bool:
        """Return whether the result is for `esm2mega finetune`."""
        return "task.kind" in self.settings

    @property
    def is_from_a_checkpoint(self) -> bool:
        """Return whether the model is that of a checkpoint, which only a fine-tuning takes it from."""
        return self.finetunes and "init_from" in self.settings


def translate_file(file: str, out: str) -> list[str]:
    """Translate a file and write the result.

    Args:
        file: File of another system.
        out: File to write.

    Returns:
        Lines that say what was translated and what was not.

    Raises:
        UserError: `out` exists, or the file is of no system that is known.
    """
    refuse_existing(Path(out))
    refuse_compressed(Path(out))
    translation = translate(Path(file))
    with replacing(Path(out), OTHER_OUT) as partial:
        partial.write_text(as_yaml(translation), encoding="utf-8")
    return [
        f"{out}: {len(translation.settings)} keys, from {_source(translation)}",
        *_report(translation, out),
    ]


def translate(path: Path) -> Translation:
    """Translate a file of another system.

    Raises:
        UserError: It cannot be read, or is of no system that is known.
    """
    foreign = read_foreign(path, known_keys())
    table = foreign.table
    given = {name: value for name, value in foreign.values.items() if not isinstance(value, Unset)}
    found = Translation(foreign, remarks=list(foreign.notes))
    readable = {name: value for name, value in given.items() if name not in foreign.unresolved}
    defaults = table.defaults.get(foreign.program) or table.defaults.get("") or {}
    source = Source({**{k: v for k, v in defaults.items() if k not in given}, **readable})
    for name, value in given.items():
        _translate_key(found, name, value, source)
    for name, value in defaults.items():
        if name not in foreign.values:
            _translate_default(found, name, value, source)
    _habits(found)
    before = dict(found.settings)
    shaped(found.settings)
    found.remarks += table.finish(found.settings, source)
    for key, value in found.settings.items():
        if before.get(key) != value:
            found.origins.setdefault(key, "computed from the whole file")
    _unresolved(found, source)
    _one_way_to_count(found)
    _shape_of_checkpoint(found)
    found.processes = _processes(found, source)
    found.commands += table.prepare(source)
    return found


def _processes(found: Translation, source: Source) -> int:
    """Return the number of processes that a file asks for; one if it does not say."""
    try:
        return math.prod(int(source.number(name) or 1) for name in found.foreign.table.processes)
    except (Untranslated, OverflowError):  # such as "auto"
        return 1


def _translate_key(found: Translation, name: str, value: Any, source: Source) -> None:
    """Add what one key of the file becomes."""
    foreign = found.foreign
    rule = foreign.table.rule(name)
    line = f"{foreign.places[name]}: {foreign.written[name]}={shown(value)}"
    if rule is None:
        found.untranslated.append(f"{line}: is not in the table of {foreign.table.system}")
    elif rule.kind == "elsewhere":
        found.elsewhere.append(f"{line}: {rule.note}")
    elif name in foreign.unresolved and rule.kind == "same":
        found.needless.append(foreign.written[name])
    elif name in foreign.unresolved:
        pass  # whether it matters is known when all others are, see `_unresolved`
    else:
        try:
            settings = rule.apply(value, source)
            _check(found, settings, foreign.places[name])
        except Untranslated as reason:
            found.untranslated.append(f"{line}: {reason}")
            return
        except UserError as reason:
            found.untranslated.append(
                f"{line}: {str(reason).removeprefix(foreign.places[name]).lstrip(': ')}"
            )
            return
        _add(found, settings, foreign.written[name], line)
        if not settings:
            found.needless.append(foreign.written[name])
        if rule.remark:
            found.remarks.append(f"{foreign.written[name]}: {rule.remark}")


def _check(found: Translation, settings: Settings, place: str) -> None:
    for key, value in settings.items():
        found.check(key, value, place)


def _add(found: Translation, settings: Settings, name: str, line: str) -> None:
    """Add settings of one key; what another key has set already to another value is told."""
    for key, value in settings.items():
        if key not in found.settings:
            found.settings[key], found.origins[key] = value, name
        elif found.settings[key] != value:
            found.untranslated.append(
                f"{line}: {key}={shown(found.settings[key])} stands, from {found.origins[key]}"
            )


def _translate_default(found: Translation, name: str, value: str, source: Source) -> None:
    """Add what a default of that system becomes, where the file says nothing."""
    rule: Rule | None = found.foreign.table.rule(name)
    assert rule is not None, name
    try:
        settings = rule.apply(value, source)
        _check(found, settings, name)
    except (Untranslated, UserError):
        return
    for key, ours in settings.items():
        if key not in found.settings:
            found.settings[key] = ours
            found.origins[key] = f"{found.foreign.table.written(name)}, by default"


def _habits(found: Translation) -> None:
    """Add what that system did without a key."""
    for habit in found.foreign.table.habits:
        applies = habit.when == "both" or (habit.when == "finetuning") == found.finetunes
        if applies and habit.ours not in found.settings:
            found.settings[habit.ours] = habit.value
            found.origins[habit.ours] = f"{found.foreign.table.system}: {habit.why}"


def _unresolved(found: Translation, source: Source) -> None:
    """List the keys whose value the file does not hold, unless any value of them needs nothing."""
    foreign = found.foreign
    for name, reason in foreign.unresolved.items():
        rule = foreign.table.rule(name)
        if rule is None or rule.kind != "key":
            continue
        with suppress(Untranslated):
            if not rule.apply(foreign.values[name], source):
                found.needless.append(foreign.written[name])
                continue
        line = f"{foreign.places[name]}: {foreign.written[name]}={shown(foreign.values[name])}"
        found.untranslated.append(
            f"{line}: {reason}" + (f"; set {' or '.join(rule.ours)}" if rule.ours else "")
        )


def _shape_of_checkpoint(found: Translation) -> None:
    """Leave out the dimensions of a model that is fine-tuned, since its checkpoint has them."""
    if not found.is_from_a_checkpoint:
        return
    for key in ("model.size", FROM, *(f"model.{name}" for name in ModelShape._fields)):
        if found.settings.pop(key, None) is not None:
            found.remarks.append(f"{key}: left out, since the model is that of init_from")


def _one_way_to_count(found: Translation) -> None:
    """Leave out the accumulation where the whole batch is given too, which says it already."""
    key = "train.accumulate_grad_batches"
    if "train.global_batch_size" in found.settings and found.settings.pop(key, None) is not None:
        found.remarks.append(f"{key}: left out, since train.global_batch_size is given")


def as_yaml(translation: Translation) -> str:
    """Return the configuration as YAML, each key with a comment that says what it was made of."""
    lines = [
        f"# Translated by esm2mega {__version__} from {_source(translation)}.",
        *_comments("Not translated", translation.untranslated),
        *_comments("Done elsewhere", translation.elsewhere),
        *_comments("Before the start", translation.commands),
        *_comments("To know", translation.remarks),
    ]
    order = list(known_keys())
    section: list[str] = []
    for key in sorted(translation.settings, key=lambda key: order.index(key) if key in order else len(order)):
        *parents, name = key.split(".")
        common = next(
            (i for i, pair in enumerate(zip(section, parents, strict=False)) if pair[0] != pair[1]), None
        )
        common = min(len(section), len(parents)) if common is None else common
        lines += [f"{_INDENT * depth}{parents[depth]}:" for depth in range(common, len(parents))]
        section = parents
        origin = _one_line(translation.origins.get(key, ""))
        text = f"{_INDENT * len(parents)}{name}: {written(translation.settings[key])}"
        lines.append(f"{text}  # {origin}" if origin else text)
    return "\n".join(lines) + "\n"


def _comments(title: str, lines: list[str]) -> list[str]:
    return [f"# {title}:", *(f"#   {_one_line(line)}" for line in lines)] if lines else []


def _one_line(text: str) -> str:
    """Return text of a file so that it cannot end a comment or move the cursor of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _source(translation: Translation) -> str:
    return f"{_one_line(str(translation.foreign.path))} ({translation.foreign.table.system})"


def _report(translation: Translation, out: str) -> list[str]:
    """Return lines that say what was not translated, and what to do next."""
    lines = []
    for title, entries in (
        ("not translated", translation.untranslated),
        ("done elsewhere", translation.elsewhere),
        ("to know", translation.remarks),
    ):
        lines += [f"{title}:", *(f"  {_one_line(entry)}" for entry in entries)] if entries else []
    if translation.needless:
        lines += [f"no key is needed for: {_one_line(', '.join(translation.needless))}"]
    lines += [f"still to give: {', '.join(missing)}"] if (missing := _missing(translation)) else []
    lines += problems(translation, out)
    commands = [*translation.commands, _start(translation, out)]
    return [*lines, "next:", *(f"  {_one_line(command)}" for command in commands)]


def _missing(translation: Translation) -> list[str]:
    """Return the keys without which a training does not start."""
    settings = translation.settings
    missing = [] if "data.train" in settings else ["data.train"]
    if (
        not {"model.size", FROM, "model.num_layers"} & settings.keys()
        and not translation.is_from_a_checkpoint
    ):
        missing.append("model.size")
    if settings.get("train.eval_every") and "data.valid" not in settings:
        missing.append("data.valid")
    return missing


def _start(translation: Translation, out: str) -> str:
    """Return the command that trains with the result."""
    words = f"esm2mega {'finetune' if translation.finetunes else 'pretrain'} --config {shlex.quote(out)}"
    if translation.processes == 1:
        return words
    return f"torchrun --standalone --nproc-per-node {translation.processes} -m {words}"


def problems(translation: Translation, out: str) -> list[str]:
    """Return what has to be corrected in the result before it can be used, as one line or none."""
    source = translation.settings.get(FROM)
    # A directory need not be on this machine, but where the training starts.
    is_elsewhere = source is not None and not Path(source).expanduser().is_dir()
    try:
        if is_elsewhere or "model.size" in _missing(translation) or translation.is_from_a_checkpoint:
            # A model in place of the one that is still to come.
            run = load_run_over(load_run(None, ["model.size=15B"]), [f"{FROM}=null"], out)
        else:
            run = load_run(out)
        validate(run, max(processes_of_a_replica(run.parallel), translation.processes))
        if translation.finetunes:
            validate_task(run)
    except UserError as error:
        return [f"to correct: {_one_line(str(error))}"]
    return []
