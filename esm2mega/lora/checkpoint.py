"""Saves and loads checkpoints that hold adapters, and a head, without the weights under them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core.utils import unwrap_model
from torch import Tensor

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.digests import write_digests
from esm2mega.checkpoint.store import load_weights
from esm2mega.checkpoint.tensor_filter import ALL, ENCODER, OPTIMIZER, TASK_HEAD, TRAINED, TensorFilter
from esm2mega.checkpoint.tensors import TensorInfo, TensorReader
from esm2mega.checkpoint.writer import StackedTensor, write_weights
from esm2mega.config.lora import LINEARS, LM_HEAD, Linear, Targets, is_trained_bias, targets_of
from esm2mega.config.schema import FinetuneConfig, Run
from esm2mega.convert.files.distributed_writer import stacked_name
from esm2mega.convert.into_model import load_for_task, load_initial_weights
from esm2mega.convert.lazy_weights import HeadDescription
from esm2mega.convert.name_table import OUTPUT_BIAS, TABLE, is_lm_head
from esm2mega.convert.start_point import StartPoint
from esm2mega.convert.tensors import cut_vocabulary, pad_vocabulary
from esm2mega.errors import UserError
from esm2mega.lora.base import Base, check_adapters, check_base, has_adapters, identify, recorded_base
from esm2mega.lora.inject import SUFFIX, apply_lora, is_adapter
from esm2mega.model.esm2 import padded_vocab_size
from esm2mega.model.freezing import gathered, refuse_split_layers
from esm2mega.model.heads.task import ESM2ForTask
from esm2mega.parallel.errors import on_one_rank


@dataclass(frozen=True)
class Factors:
    """Holds one whole adapter: ``lora_A [r, i]``, ``lora_B [o, r]``, and ``magnitude [o]`` or None."""

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        """Return the tensors by the names that they have in a checkpoint."""
        return {name: value for name, value in vars(self).items() if value is not None}


class AdapterReader:
    """Reads the adapters of a checkpoint one at a time, without a model.

    Attributes:
        start: Checkpoint that holds the adapters.
        base: Weights that the adapters belong to.
        run: Configuration of the checkpoint.
        targets: Layers that have an adapter, by the name of the linear.
        others: Names of the tensors that were trained besides the adapters: those of a head, and weights of
            the base that a transform did not freeze, stacked over the layers.
    """

    def __init__(self, start: StartPoint) -> None:
        """Open the adapters.

        Args:
            start: Checkpoint that holds them.

        Raises:
            UserError: The checkpoint holds a whole model.
        """
        self.start = start
        self.base = recorded_base(start)
        self.run = start.run
        self._reader = TensorReader(start.path)
        self.targets: Targets = targets_of(self.run)
        weights = (name for name in self._reader.index if not name.startswith(OPTIMIZER))
        self.others = [name for name in weights if not (is_adapter(name) or self._is_bias(name))]

    def head(self) -> HeadDescription | None:
        """Return the head of a task that was trained beside the adapters, if there is one."""
        if (head := self.start.task) is None:
            return None
        names = [name for name in self.others if name.startswith(TASK_HEAD)]
        return replace(head, shapes={name: self._reader.index[name].shape for name in names})

    @property
    def of_base(self) -> list[str]:
        """Return the names of trained weights that replace those of the base."""
        return [name for name in self.others if not name.startswith(TASK_HEAD)]

    def read_other(self, name: str, layer: int | None = None) -> Tensor:
        """Return the tensor `name`, which was trained besides the adapters, or only that of a layer.

        The vocabulary comes without its padding.
        """
        value = self._reader.read(name, layer)
        return cut_vocabulary(value) if name in (TABLE, OUTPUT_BIAS) else value

    def read(self, linear: Linear, layer: int) -> Factors | None:
        """Return the factors of a linear in a layer, or None if it has no adapter there."""
        layers = self.targets.get(linear.name, ())
        if layer not in layers:
            return None
        stem, number = stored_name(linear), None if linear is LM_HEAD else layers.index(layer)
        names = ["lora_A", "lora_B", *(["magnitude"] if self.run.lora.use_dora else [])]
        return Factors(*(self._reader.read(f"{stem}.{name}", number) for name in names))

    def read_bias(self, name: str) -> Tensor | None:
        """Return a bias that was trained, by its name among the whole tensors of a model; else None."""
        # A model with the head of a task has none of these.
        if is_lm_head(name) and self.run.task.kind is not None:
            return None
        if not self._is_bias(name):
            return None
        return self.read_other(*stacked_name(name))

    def _is_bias(self, name: str) -> bool:
        """Tell whether a tensor is one of the biases that `lora.bias` trains besides those of a head."""
        return not name.startswith(TASK_HEAD) and is_trained_bias(name, self.run.lora, self.targets)


def stored_name(linear: Linear) -> str:
    """Return the prefix of the names of a linear's adapter tensors, which stack all layers along axis 0."""
    if linear is LM_HEAD:
        return f"{linear.name}{SUFFIX}"
    return f"encoder.layers.{linear.block}.{linear.name}{SUFFIX}"


def write_adapters(
    directory: Path,
    run: Run,
    base: Base,
    factors: Mapping[tuple[str, int], Factors],
    state: dict[str, Any],
    others: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint of adapters that do not come from a run.

    Args:
        directory: An existing, empty directory.
        run: Configuration, with the section of the adapters.
        base: Weights that the adapters belong to.
        factors: Factors by name of the linear and layer, exactly those of `run.lora.target_modules`.
        state: Further entries of ``train_state.json``.
        others: Tensors of the head of a task, and trained biases, by their names among whole tensors.
    """
    targets = targets_of(run)
    stacked: dict[str, StackedTensor] = {}
    sources: dict[str, list[Tensor]] = {}
    for linear in (*LINEARS, LM_HEAD):
        layers = targets.get(linear.name, ())
        for name in factors[linear.name, layers[0]].present() if layers else ():
            stored = f"{stored_name(linear)}.{name}"
            values = sources[stored] = [factors[linear.name, layer].present()[name] for layer in layers]
            stacked[stored] = _entry(values, is_stacked=linear is not LM_HEAD)
    for name, value in others.items():
        stored, layer = stacked_name(name)
        if name == OUTPUT_BIAS:
            value = pad_vocabulary(value, padded_vocab_size(1))
        sources.setdefault(stored, []).append(value)
        # The layers come in their order, each of them once.
        assert layer in (None, len(sources[stored]) - 1)
        stacked[stored] = _entry(sources[stored], is_stacked=layer is not None)
    write_weights(directory / layout.MODEL, stacked, lambda name, layer: sources[name][layer or 0])
    layout.write_description(directory, run, {**state, **base.as_state()})
    write_digests(directory)


def _entry(values: Sequence[Tensor], is_stacked: bool) -> StackedTensor:
    """Describe a tensor of all layers, or one that is in no layer."""
    shape = tuple(values[0].shape)
    count = len(values) if is_stacked else None
    return StackedTensor(TensorInfo(shape if count is None else (count, *shape), values[0].dtype), count)


def load_model(
    start: StartPoint, run: Run, chunks: Sequence[Any], tensor_filter: TensorFilter = TRAINED
) -> dict[str, Tensor]:
    """Fill a model from a checkpoint of this package, whole or of adapters; every rank calls this.

    Args:
        start: The checkpoint; one of adapters comes with its base.
        run: Configuration of this start.
        chunks: This rank's chunks of the model, which get the adapters.
        tensor_filter: Chooses the tensors to restore from a checkpoint of adapters.

    Returns:
        Auxiliary tensors by name.

    Raises:
        UserError: A tensor is missing, or the base has other weights.
    """
    if not has_adapters(start):
        load_weights(start.path, chunks)
        return start.auxiliary()
    _, auxiliary = load_base(start, run, chunks)
    load_weights(start.path, chunks, tensor_filter)
    return auxiliary


def load_base(
    start: StartPoint, run: Run, chunks: Sequence[Any], transform: Callable[[Any], Any] | None = None
) -> tuple[Base, dict[str, Tensor]]:
    """Fill a model with the weights of its base and add new adapters.

    Besides them a task's head is trained in full, or what `transform` does not freeze.

    Args:
        start: A checkpoint of adapters with its base, whose adapters and head will be loaded next; or a whole
            model, on which new adapters are trained.
        run: Configuration of this start.
        chunks: This rank's chunks of the model.
        transform: Freezes weights of a chunk and adds the adapters, in a new training; one that is resumed
            trains what its checkpoint holds.

    Returns:
        The base and its auxiliary tensors.

    Raises:
        UserError: The base has other weights than those recorded with the adapters.
    """
    has_head = run.task.kind is not None
    base = start if start.base is None else start.base
    if start.base is not None:
        check_adapters(start, run.lora)
    identity = on_one_rank(lambda: identify(base))
    if start.base is not None:
        check_base(start, identity)
    others = None if start.base is None else set(AdapterReader(start).others)
    # A head that was not trained is that of the base.
    head_of_base = others is None or not any(name.startswith(TASK_HEAD) for name in others)
    if has_head and head_of_base and isinstance(unwrap_model(chunks[0]), ESM2ForTask):
        auxiliary = load_for_task(base, run, chunks)
    else:
        auxiliary = load_initial_weights(base, run.model, chunks, ENCODER if has_head else ALL)
    base.release()
    if others is not None:
        apply_lora(chunks, run.lora, run.seed, lambda name: stacked_name(name)[0] in others)
    elif transform is None:
        apply_lora(chunks, run.lora, run.seed, lambda name: has_head and name.startswith(TASK_HEAD))
    else:
        apply_lora(chunks, run.lora, run.seed, transform=transform)
        _check_transformed(chunks, run.finetune)
    return identity, auxiliary


def _check_transformed(chunks: Sequence[Any], finetune: FinetuneConfig) -> None:
    """Refuse what no checkpoint could hold of a user's transform; all ranks call this together."""
    parameters = {
        chunk.global_parameter_name(name): parameter.requires_grad
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }
    names, trained = gathered(parameters), set(gathered(name for name, on in parameters.items() if on))
    if not any(map(is_adapter, trained)):
        raise UserError(
            "transform: no linear has a trained adapter; let `transform` call that of LoRATransform"
        )
    base = [name for name in names if not is_adapter(name)]
    refuse_split_layers(base, trained.__contains__, "transform.selective_freeze")
    if not finetune.load_head and not any(name.startswith(TASK_HEAD) for name in trained):
        raise UserError(
            "transform.selective_freeze freezes a head with random weights; leave it to be trained, or load "
            "it with finetune.load_head=true"
        )
