"""Lists the ESM-2 model sizes under their published tags, and `tiny` for tests and first steps on a CPU."""

from __future__ import annotations

from typing import NamedTuple

from esm2mega.config.schema import ModelConfig
from esm2mega.errors import UserError


class ModelShape(NamedTuple):
    """Holds the four dimensions that a size stands for; field names are those of `ModelConfig`."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, hidden {self.hidden_size}, {self.num_attention_heads} heads, "
            f"FFN {self.ffn_hidden_size}"
        )


# The tag counts parameters; the published checkpoint of each is named esm2_t<layers>_<tag>_UR50D.
PRESETS: dict[str, ModelShape] = {
    "tiny": ModelShape(num_layers=4, hidden_size=128, ffn_hidden_size=512, num_attention_heads=4),
    "8M": ModelShape(num_layers=6, hidden_size=320, ffn_hidden_size=1280, num_attention_heads=20),
    "35M": ModelShape(num_layers=12, hidden_size=480, ffn_hidden_size=1920, num_attention_heads=20),
    "150M": ModelShape(num_layers=30, hidden_size=640, ffn_hidden_size=2560, num_attention_heads=20),
    "650M": ModelShape(num_layers=33, hidden_size=1280, ffn_hidden_size=5120, num_attention_heads=20),
    "3B": ModelShape(num_layers=36, hidden_size=2560, ffn_hidden_size=10240, num_attention_heads=40),
    "15B": ModelShape(num_layers=48, hidden_size=5120, ffn_hidden_size=20480, num_attention_heads=40),
}


def shape_of(model: ModelConfig) -> ModelShape:
    """Return the dimensions of a loaded configuration, as plain integers.

    Raises:
        UserError: A dimension is missing, because neither a size nor all four dimensions were given.
    """
    values = {name: getattr(model, name) for name in ModelShape._fields}
    missing = [f"model.{name}" for name, value in values.items() if value is None]
    if missing:
        raise UserError(
            f"the model has no shape: {', '.join(missing)} not set; "
            f"set model.size (one of {', '.join(PRESETS)}) or all four dimensions"
        )
    return ModelShape(**values)


def fill_shape(model: ModelConfig) -> None:
    """Set the dimensions that `model.size` stands for.

    Raises:
        UserError: An explicit dimension contradicts the size, or there are neither size nor all dimensions.
    """
    if model.size is None:
        shape_of(model)
        return
    for name, preset in PRESETS[model.size]._asdict().items():
        explicit = getattr(model, name)
        if explicit is not None and explicit != preset:
            raise UserError(
                f"model.{name}={explicit} contradicts model.size={model.size}, which has {preset}; "
                f"set model.size=null to give all four dimensions, or drop model.{name}"
            )
        setattr(model, name, preset)
