"""Defines the transform of a model for adapters: what it freezes, and which linears it adapts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer

from esm2mega.config.lora import resolve_targets
from esm2mega.config.schema import LoRAConfig
from esm2mega.lora.inject import adapt_layer


class LoRATransform:
    """Freezes weights of a model and puts adapters beside its linears; subclass it to freeze others.

    Attributes:
        config: Rank, scale, dropout, kind and targets of the adapters.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: Sequence[str] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> None:
        """Set up the adapters; the arguments are the keys of the section ``lora`` of the configuration."""
        targets = list(target_modules)
        self.config = LoRAConfig(rank, alpha, dropout, targets, use_rslora, use_dora)

    def __call__(self, model: Any) -> Any:
        """Walk all modules with `selective_freeze`, then with `transform`; return the model.

        Args:
            model: A chunk of the model, with its weights, before it is wrapped for data parallelism.
        """
        walk(model, self.selective_freeze)
        walk(model, self.transform)
        return model

    def selective_freeze(self, module: Any, name: str, prefix: str) -> Any:
        """Freeze the weights of a module, or leave them to be trained; return the module.

        By default the modules ``encoder`` and ``embedding`` are frozen, and the head is trained. What is
        frozen must be the same in all layers.

        Args:
            module: The module; a frozen one has ``requires_grad = False`` in its parameters.
            name: Its name in its parent, empty for the model; of a layer its number in the whole model.
            prefix: Name of the parent in the model.
        """
        if name in ("encoder", "embedding"):
            module.requires_grad_(False)
        return module

    def transform(self, module: Any, name: str, prefix: str) -> Any:
        """Put adapters beside the linears of a module if it is a transformer layer; return the module.

        The arguments are those of `selective_freeze`.
        """
        if isinstance(module, TransformerLayer):
            targets = resolve_targets(self.config.target_modules, module.config.num_layers)
            adapt_layer(module, self.config, targets)
        return module


def walk(model: Any, visit: Callable[[Any, str, str], Any]) -> None:
    """Call `visit` with every module of a model, parents first, its name and that of its parent.

    Layers are numbered as in the whole model.
    """
    found: list[tuple[Any, str, str]] = []

    def collect(module: Any, name: str, prefix: str) -> None:
        found.append((module, name, prefix))
        own = f"{prefix}.{name}" if prefix else name
        for child_name, child in module.named_children():
            is_layer = isinstance(child, TransformerLayer)
            collect(child, str(child.layer_number - 1) if is_layer else child_name, own)

    # First of all: a visit may add modules.
    collect(model, "", "")
    for module, name, prefix in found:
        visit(module, name, prefix)
