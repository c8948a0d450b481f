"""Reads YAML files and `key=value` overrides into a typed `Run`; a mistake gives one line with its cure.

The files in `defaults` come first, in order, then the file itself, then the `key=value` overrides. A scalar
is text until the type of its key makes it something else, see `esm2mega.config.typed`. OmegaConf types and
interpolates (`${oc.env:HOME}`, `${train.micro_batch_tokens}`); its own errors never reach the user.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import os
import pickle
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, MissingMandatoryValue, OmegaConfBaseException

from esm2mega.config.architecture import with_architecture
from esm2mega.config.batches import PROTEIN_KEYS, fill_batches, way_of_counting
from esm2mega.config.keys import is_section, known_keys, refusal_of_unknown
from esm2mega.config.presets import fill_shape
from esm2mega.config.renamed import REMOVED, current_key, refusal_of_key
from esm2mega.config.resolved import FIRST_WORDS
from esm2mega.config.scalars import (
    Unset,
    each_text,
    escaped,
    literal,
    read_word,
    read_yaml,
    show,
    shown,
    written,
)
from esm2mega.config.schema import Run, ScheduleConfig, TrainConfig, flatten
from esm2mega.config.setting import Setting
from esm2mega.config.typed import as_typed, expected, is_text
from esm2mega.config.validate import check_choices
from esm2mega.errors import UserError
from esm2mega.files import real_path

_WITH_GAPS = ("task.mask_column",)
"""Names the keys whose lists may have nulls in them."""


def load_run(config: str | None, overrides: Sequence[str] = ()) -> Run:
    """Load, merge, type and resolve a configuration.

    Args:
        config: Path of a YAML file, or the name of a shipped one (`pretrain_esm2_8M`); None for the defaults.
        overrides: `key=value` with dotted keys; a leading `+` or `++` is accepted and means the same.

    Raises:
        UserError: A file cannot be read, YAML is not valid, a key is unknown, a value has the wrong type, or
            dimensions contradict each other.
    """
    return resolve(_to_run(_defaults(), _given(config, overrides)))


def run_from_yaml(path: str | os.PathLike[str], ignore: Sequence[str] = ()) -> Run:
    """Read a configuration that `save_resolved` wrote, and nothing but this file.

    It may come from a stranger, as part of a checkpoint. So ``${…}`` in it is text, which neither the
    environment nor another key replaces, and no file or shipped configuration that it names is looked up.

    Args:
        path: The file.
        ignore: Top-level keys that the writer added to those of the run.
    """
    return _literal_run(*_read_config(Path(path)), Path(path), ignore)


def _literal_run(
    content: dict[Any, Any], lines: dict[str, int], path: Path, ignore: Sequence[str] = ()
) -> Run:
    found = _current(_leaves(content, "", path, lines))
    settings = [replace(s, value=each_text(s.value, literal)) for s in found if s.key not in ignore]
    return resolve(_to_run(_defaults(), settings))


def run_from_text(text: str, path: Path) -> Run:
    """Read what `resolved_text` returned, as `run_from_yaml` does; `path` names its place in errors."""
    return _literal_run(*_parsed(text, path), path)


def load_run_over(base: Run, overrides: Sequence[str], config: str | None = None) -> Run:
    """Change a resolved run by a file and `key=value` overrides, checked and resolved as `load_run` does.

    Values of the shipped `base.yaml` in the section `model` are defaults, which do not replace the model of
    `base`; values that another file sets do.

    Args:
        base: The run to change.
        overrides: `key=value`, as for `load_run`.
        config: Path or name of a file whose values come before the overrides; None for none.
    """
    settings = [s for s in _given(config, overrides) if not (s.key.startswith("model.") and _is_default(s))]
    tree, defaults = _defaults(), flatten(Run())
    for key, value in flatten(base).items():
        if value != defaults[key]:  # setting all of them takes as long as making a tree
            OmegaConf.update(tree, key, each_text(value, escaped), merge=False)
    return resolve(_to_run(tree, settings))


def _given(config: str | None, overrides: Sequence[str]) -> list[Setting]:
    """Return what a file and overrides set, in the order in which it holds."""
    settings = list(_file_settings(find_config(config), ())) if config is not None else []
    settings += [_parse_override(text) for text in overrides]
    if way_of_counting((s.key, s.value, s.where) for s in settings) == "tokens":
        # Proteins that an earlier source counts count no more. In the other way, tokens are derived.
        unset = [Setting(key, Unset("null"), "override") for key in PROTEIN_KEYS]
        settings = unset + [s for s in settings if s.key not in PROTEIN_KEYS]
    return with_architecture(settings, _is_default, _value_of)


def given_keys(config: str | None, overrides: Sequence[str] = ()) -> frozenset[str]:
    """Return the keys that a file or overrides set to more than null, the shipped `base.yaml` aside.

    Args:
        config: Path or name of a file; None for none.
        overrides: `key=value`, as for `load_run`.
    """
    settings = _given(config, overrides)
    return frozenset(s.key for s in settings if not (_is_default(s) or isinstance(s.value, Unset)))


def _value_of(setting: Setting) -> Any:
    """Return the value that a setting alone gives its key."""
    with _naming_places([setting]):
        return OmegaConf.select(_tree(_defaults(), [setting]), setting.key)


def _is_default(setting: Setting) -> bool:
    """Return whether a setting was written in the shipped `base.yaml`."""
    file = Path(setting.where.rpartition(":")[0])
    return file.name == "base.yaml" and real_path(file) == real_path(conf_dir() / "base.yaml")


def value_checker() -> Callable[[str, object, str], None]:
    """Return a function that refuses a value which a key does not take, whatever the others are.

    It takes the dotted key, the value as a program holds it, and where it was written, and raises `UserError`
    if the key is unknown, or its type is another one.
    """
    tree = _defaults()  # one for all values, since a copy of it takes longer than they do
    stand_for_others = known_keys().keys() - flatten(Run()).keys()  # these are gone once a run is loaded

    def check(key: str, value: object, where: str) -> None:
        if key not in stand_for_others:
            _apply(tree, Setting(key, read_yaml(written(value))[0], where))

    return check


def values_of(keys: Sequence[str], config: str | None, overrides: Sequence[str] = ()) -> list[Any]:
    """Return the values that a file and overrides give single keys, whatever else they set.

    Args:
        keys: Dotted keys; the value of one that is not set is None.
        config: Path or name of a file; None for none.
        overrides: `key=value`, as for `load_run`.

    Raises:
        UserError: A setting is refused, or one of these values is a reference that leads nowhere.
    """
    settings = _given(config, overrides)
    tree = _tree(_defaults(), settings)
    given = {setting.key for setting in settings}
    with _naming_places(settings):
        return [OmegaConf.select(tree, key) if key in given else None for key in keys]


def resolve(run: Run) -> Run:
    """Return a copy with the derived keys filled: the model's dimensions, T, and the end of the decay."""
    run = copy.deepcopy(run)
    check_choices(run)
    fill_shape(run.model)
    fill_batches(run.train, run.data)
    if run.train.max_epochs is None:  # else the length is known when the data are, see `resolve_max_steps`
        _fill_decay(run.schedule, run.train)
    return run


def resolve_max_steps(run: Run, max_steps: int) -> Run:
    """Return a copy of a run given in epochs, with its length in steps and the end of the decay filled."""
    run = copy.deepcopy(run)
    run.train.max_steps = max_steps
    _fill_decay(run.schedule, run.train)
    return run


def _fill_decay(schedule: ScheduleConfig, train: TrainConfig) -> None:
    if schedule.decay_steps is None:
        # ESM-2 decays over 90 % of training and then stays flat. Integers: 0.9 * max_steps may round down.
        part = 9 if schedule.name in ("linear", "cosine_plateau") else 10
        schedule.decay_steps = max(1, part * train.max_steps // 10)


def conf_dir() -> Path:
    """Return the directory of the shipped configurations, in the installed package or beside a checkout's."""
    package = Path(str(resources.files("esm2mega")))
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def config_names() -> list[str]:
    """Return the names of the shipped configurations, those in folders too."""
    return sorted(path.stem for path in conf_dir().rglob("*.yaml"))


def find_config(config: str, beside: Path | None = None) -> Path:
    """Find the file that `config` means.

    It is a path, else a name in the folder `beside`, else a shipped name, with or without its folder
    (``flip_gb1``, ``finetune/flip_gb1``).

    Raises:
        UserError: There is no such file or name.
    """
    path = Path(config)
    if path.is_file():
        return path
    folders = [conf_dir(), *(folder for folder in conf_dir().iterdir() if folder.is_dir())]
    if path.name == config and beside is not None:
        folders.insert(0, beside)
    for folder in folders if not path.is_absolute() else []:
        for name in (config, f"{config}.yaml"):
            if (folder / name).is_file():
                return folder / name
    if path.name == config and path.suffix not in (".yaml", ".yml") and not path.exists():
        near = difflib.get_close_matches(config, config_names(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"no configuration file or shipped name {config!r} (names: {', '.join(config_names())}){hint}"
        )
    reason = "is a directory" if path.is_dir() else "does not exist"
    raise UserError(
        f"configuration file {config} {reason}; give a YAML file or one of {', '.join(config_names())}"
    )


def _file_settings(path: Path, including: tuple[Path, ...]) -> Iterator[Setting]:
    """Yield the settings of a file, those of its `defaults` first."""
    if real_path(path) in including:
        raise UserError(f"{path}: includes itself through `defaults`; remove the cycle")
    content, lines = _read_config(path)
    defaults = content.pop("defaults", Unset())
    settings = list(_leaves(content, "", path, lines))
    if any(setting.key not in known_keys() for setting in settings):
        # The tables of other systems are large, and needed only for what is not ours.
        from esm2mega.config.foreign.answers import refuse_file

        refuse_file(path, content, known_keys())
    defaults = [] if isinstance(defaults, Unset) else defaults
    for name in defaults if isinstance(defaults, list) else [defaults]:
        where = f"{path}:{lines.get('defaults', 1)}"
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: defaults must be a name or a list of names, got {shown(name)}")
        try:
            found = find_config(name, beside=path.parent)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        yield from _file_settings(found, (*including, real_path(path)))
    yield from _current(settings) if _is_resolved(path) else settings


def _current(settings: Iterable[Setting]) -> Iterator[Setting]:
    """Yield the settings of a file that esm2mega wrote, under the names that their keys have now."""
    for setting in settings:
        if setting.key not in REMOVED:
            yield dataclasses.replace(setting, key=current_key(setting.key))


def _is_resolved(path: Path) -> bool:
    """Return whether `save_resolved` wrote a file, whose keys may be those of an earlier version."""
    return path.read_text(encoding="utf-8").startswith(FIRST_WORDS)


def _read_config(path: Path) -> tuple[dict[Any, Any], dict[str, int]]:
    """Return a file's mapping, and the line of every dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 (byte {error.start}); give a YAML file") from error
    return _parsed(text, path)


def _parsed(text: str, path: Path) -> tuple[dict[Any, Any], dict[str, int]]:
    """Return the mapping that a YAML text holds, and the line of every dotted key."""
    try:
        content, lines = read_yaml(text)
    except yaml.MarkedYAMLError as error:
        _refuse_script(path, text)
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        problem = " ".join(str(error.problem or error.context or "unreadable").split())
        raise UserError(f"{path}:{line}: not valid YAML: {problem}; correct this line") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not a YAML configuration: {_first_line(error)}") from error
    except RecursionError as error:
        raise UserError(f"{path}: not a YAML configuration: it is nested too deeply") from error
    if not isinstance(content, dict):
        _refuse_script(path, text)
        raise UserError(f"{path}: the top level must be `key: value` pairs, as in {conf_dir() / 'base.yaml'}")
    return content, lines


def _refuse_script(path: Path, text: str) -> None:
    from esm2mega.config.foreign.answers import refuse_script

    refuse_script(path, text)


def _leaves(content: dict[Any, Any], prefix: str, path: Path, lines: dict[str, int]) -> Iterator[Setting]:
    """Yield the values of a file's mapping; whatever is not a section is a value, even of an unknown key."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if is_section(key) and isinstance(value, dict):
            yield from _leaves(value, f"{key}.", path, lines)
        elif is_section(key) and isinstance(value, Unset):
            continue  # a section whose keys are all commented out
        else:
            yield Setting(key, value, f"{path}:{lines.get(key, 1)}")


def _parse_override(text: str) -> Setting:
    key, equals, word = text.partition("=")
    key = key.strip().lstrip("+")
    if not equals or not key:
        raise UserError(f"override {text!r} is not key=value; write for example train.max_steps=100")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"override {text!r} is not text in UTF-8; write it in UTF-8") from error
    try:
        value = read_word(word, is_text=is_text(known_keys().get(key)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"override {shown(text)!r}: the value is not valid YAML: {_first_line(error)}; quote it"
        ) from error
    return Setting(key, value, "override")


def _tree(tree: DictConfig, settings: Iterable[Setting]) -> DictConfig:
    """Apply settings to a typed tree, which is changed, and return it."""
    for setting in settings:
        _apply(tree, setting)
    return tree


def _apply(tree: DictConfig, setting: Setting) -> None:
    """Set one value in the typed tree, or say what is wrong with it."""
    key, value = setting.key, setting.value
    types_of = known_keys()
    if is_section(key):
        inside = [k for k in types_of if k.startswith(f"{key}.")]
        raise UserError(f"{setting.where}: {key} is a section, not a value; set its keys, e.g. {inside[0]}")
    if (refusal := refusal_of_key(key, show(value))) is not None:
        raise UserError(f"{setting.where}: {refusal}")
    if key not in types_of:
        raise UserError(f"{setting.where}: {refusal_of_unknown(key, value)}")
    try:
        # A mapping takes the place of the one before, as lists do.
        OmegaConf.update(tree, key, as_typed(value, types_of[key], key in _WITH_GAPS), merge=False)
    except GrammarParseError as error:
        raise UserError(
            f"{setting.where}: {key}={shown(value)}: {_first_line(error)}; correct the ${{...}} in it, or "
            "write \\${ for the text itself"
        ) from error
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(
            f"{setting.where}: {key}={shown(value)}: expected {expected(types_of[key], key in _WITH_GAPS)}"
        ) from error


def _to_run(tree: DictConfig, settings: Sequence[Setting]) -> Run:
    """Apply settings to a typed tree, and turn it into dataclasses with references resolved."""
    _tree(tree, settings)
    with _naming_places(settings):
        run = typing.cast(Run, OmegaConf.to_object(tree))
    values = flatten(run)
    for setting in settings:
        if known_keys()[setting.key] is Any:
            value = values[setting.key]
            texts = value if isinstance(value, list) else [value]
            if not all(text is None or isinstance(text, str) for text in texts):
                raise UserError(
                    f"{setting.where}: {setting.key}={shown(setting.value)} refers to {shown(value)}, which "
                    f"is not text; expected {expected(Any, setting.key in _WITH_GAPS)}"
                )
    return run


@contextlib.contextmanager
def _naming_places(settings: Iterable[Setting]) -> Iterator[None]:
    """Turn OmegaConf's errors about references into one line that says where the value was written."""
    places = {setting.key: setting.where for setting in settings}

    def place(key: str) -> str:
        return places.get(key.partition("[")[0], "override")  # of the list, for an entry of one

    try:
        yield
    except MissingMandatoryValue as error:
        key = error.full_key or "a value"
        raise UserError(f"{place(key)}: {key}=??? must be given; add the override {key}=VALUE") from error
    except OmegaConfBaseException as error:
        key = error.full_key or "a value"
        raise UserError(f"{place(key)}: {key}: {_first_line(error)}; correct the ${{...}} in it") from error


def _defaults() -> DictConfig:
    """Return a typed tree of all defaults; reading it anew takes a twentieth of the time of making one."""
    # The bytes are those that this process has just made of the schema.
    return typing.cast(DictConfig, pickle.loads(_pickled_defaults()))


@functools.cache
def _pickled_defaults() -> bytes:
    return pickle.dumps(OmegaConf.structured(Run))


def _first_line(error: Exception) -> str:
    return (
        " ".join(str(error).strip().splitlines()[0].split()) if str(error).strip() else type(error).__name__
    )
