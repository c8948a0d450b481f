"""Takes the architecture of a model from Hugging Face, without its weights: what `model.from` stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from esm2mega.config.presets import PRESETS, ModelShape
from esm2mega.config.scalars import Unset, show, shown
from esm2mega.config.setting import Setting
from esm2mega.errors import UserError
from esm2mega.files import parse_json

FROM = "model.from"
"""Names the key that stands for others; it is no field of the schema, since no loaded run has it."""

PUBLISHED = {
    f"facebook/esm2_t{shape.num_layers}_{size}_UR50D": size
    for size, shape in PRESETS.items()
    if size != "tiny"
}
"""Maps each published name to its size; nothing is downloaded."""

DIMENSIONS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
"""Names the keys of ``config.json`` for the fields of `ModelShape`, in their order."""

DEFAULT_EPSILON = 1e-12
"""`EsmConfig` takes this for an absent ``layer_norm_eps``; public ESM-2 weights have 1e-5."""

_FILE = "config.json"

# Key: default of EsmConfig, value of ESM-2. Where they differ, an absent key means another model. The numbers
# of tokens are those of `esm2mega.vocabulary`, which is not imported here, since it needs numpy.
_OF_ESM2 = {
    "position_embedding_type": ("absolute", "rotary"),
    "token_dropout": (False, True),
    "emb_layer_norm_before": (False, False),
    "is_folding_model": (False, False),
    "add_cross_attention": (False, False),
    "is_decoder": (False, False),
    "vocab_size": (None, 33),
    "pad_token_id": (None, 1),
    "mask_token_id": (None, 32),
    "rope_theta": (10000.0, 10000.0),
}


def check_esm2(file: Path, config: Mapping[str, Any], name: str | None = None) -> None:
    """Refuse the ``config.json`` of a model that is not an ESM-2.

    Args:
        file: The file, named in errors.
        config: Its content; absent keys have the defaults of `EsmConfig`.
        name: Name of the model, where it is known to be another.
    """
    for key, (default, value) in _OF_ESM2.items():
        given = default if config.get(key) is None else config[key]
        if given != value:
            what = "" if name is None else f"is of {name}, not ESM-2: "
            raise UserError(
                f"{file}: {what}{key} is {given!r}; ESM-2 has {value!r}, and no other model is supported"
            )


def with_architecture(
    settings: Sequence[Setting], is_default: Callable[[Setting], bool], value_of: Callable[[Setting], Any]
) -> list[Setting]:
    """Replace `model.from` by the keys that it stands for, so that a resolved run names no place.

    Args:
        settings: Everything that is set, in the order in which it holds.
        is_default: Tells whether a setting is but a default, which gives way.
        value_of: Returns the value of a setting, of the type of its key.

    Raises:
        UserError: It names no model, or one of these keys is given another value beside it.
    """
    others = [setting for setting in settings if setting.key != FROM]
    named = [setting for setting in settings if setting.key == FROM]
    if not named or isinstance(named[-1].value, Unset):
        return others
    name, where = named[-1].value, named[-1].where
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{where}: {FROM}={shown(name)}: expected a name or directory of Hugging Face, or null"
        )
    try:
        found = architecture(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for setting in others:
        if setting.key not in found or isinstance(setting.value, Unset) or is_default(setting):
            continue
        if value_of(setting) != found[setting.key]:
            raise UserError(
                f"{setting.where}: {setting.key}={shown(setting.value)} contradicts {FROM}={name}, which has "
                f"{show(found[setting.key])}; leave one of the two out, or set it to null"
            )
    made = {key: Unset("null") if value is None else str(value) for key, value in found.items()}
    return others + [Setting(key, value, where) for key, value in made.items()]


def architecture(source: str) -> dict[str, Any]:
    """Return the configuration keys that a name or directory of Hugging Face stands for, with their values.

    Args:
        source: A published name (`PUBLISHED`), or a directory with the ``config.json`` of an ESM-2.

    Raises:
        UserError: It is neither, or of another model.
    """
    if source in PUBLISHED:
        size = PUBLISHED[source]
        return _keys(size, PRESETS[size]._asdict(), 1e-5)
    file = Path(source).expanduser() / _FILE
    if not file.is_file():
        raise UserError(
            f"model.from={source} is neither a directory with {_FILE} nor one of {', '.join(PUBLISHED)}; "
            "download its config.json and name the directory"
        )
    try:
        config = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); download it again") from None
    if not isinstance(config, dict) or config.get("model_type") != "esm":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise UserError(f"{file}: model_type is {kind!r}, not 'esm'; give the directory of an ESM-2")
    check_esm2(file, config)
    shape = dict(zip(ModelShape._fields, (config.get(key) for key in DIMENSIONS), strict=True))
    for key, value in zip(DIMENSIONS, shape.values(), strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{file}: {key} is {value!r}, not a positive number; download it again")
    epsilon = config.get("layer_norm_eps", DEFAULT_EPSILON)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float):
        raise UserError(f"{file}: layer_norm_eps is {epsilon!r}, not a number; download it again")
    known = next((name for name, preset in PRESETS.items() if preset._asdict() == shape), None)
    return _keys(known, shape, float(epsilon))


def _keys(size: str | None, shape: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    values = {"size": size, "family": "esm2", **shape, "layernorm_epsilon": epsilon}
    return {f"model.{key}": value for key, value in values.items()}
