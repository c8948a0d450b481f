"""`esm2mega.load` opens a model in one process, on the CPU or one GPU, for notebooks and scripts.

Legend: ``L`` residues of a protein, ``h`` hidden size, ``v`` vocabulary (33), ``n`` proteins.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from esm2mega.checkpoint.finite import not_finite
from esm2mega.config.infer import inference_run, refuse_int8, validate_inference
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.load import load_run_over
from esm2mega.config.schema import ParallelConfig
from esm2mega.data.labels.in_memory import sequences_in_memory
from esm2mega.data.variants.notation import parse_variant
from esm2mega.data.variants.variant import single_substitutions, write_variant
from esm2mega.data.variants.wild_types import clean
from esm2mega.errors import UserError
from esm2mega.infer.engine import Engine, OutputRequest, load_model
from esm2mega.infer.maps import in_memory
from esm2mega.infer.marginals import NORMALIZATIONS, Marginals
from esm2mega.infer.proteins import Embedder, Lengths, micro_batch_tokens, output_request
from esm2mega.infer.source import source_of
from esm2mega.infer.strategies import STRATEGIES, check_variant, score_variants
from esm2mega.lora.base import MERGE_THEM, read_with_base
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.vocabulary import encode_residues

Array = npt.NDArray[Any]


class _World:
    """Holds the process groups that Megatron-Core needs even in one process; all models share them."""

    def __init__(self) -> None:
        self._users = 0
        self._stack = ExitStack()
        self._ranks: Ranks | None = None

    def enter(self) -> Ranks:
        if self._ranks is None:
            if world_size_from_environment() > 1 or dist.is_initialized():
                raise UserError(
                    "esm2mega.load is for one process without torch.distributed; under torchrun use "
                    "`esm2mega embed` or `esm2mega score`"
                )
            self._ranks = self._stack.enter_context(process_groups(ParallelConfig(), seed=0))
        self._users += 1
        return self._ranks

    def leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._ranks = None
            self._stack.close()


_world = _World()


def load(
    path: str | Path,
    *,
    precision: str | None = None,
    max_seq_length: int | None = None,
    too_long: str = "error",
) -> Model:
    """Load a model for inference.

    Args:
        path: A checkpoint; or a run, ``RUN@best``, ``RUN@last`` or ``RUN@step_N``, as
            `esm2mega.checkpoint.choice.choose_checkpoint` reads them.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``fp64``; None for the precision of training.
        max_seq_length: Most tokens at once, with ``<cls>`` and ``<eos>``; None for the length of training.
        too_long: What to do about longer proteins: ``error``, ``crop`` or ``chunk`` (average over windows).

    Raises:
        UserError: There is no readable checkpoint, or this is one process of several.
    """
    settings = {"precision": precision, "max_seq_length": max_seq_length, "too_long": too_long}
    overrides = [f"infer.{name}={value}" for name, value in settings.items() if value is not None]
    return Model(path, overrides)


class Model:
    """Holds a loaded model; `close`, the end of a ``with`` block, or the end of the process frees it."""

    def __init__(self, path: str | Path, overrides: Sequence[str] = ()) -> None:
        """Load the model.

        Args:
            path: As for `load`.
            overrides: ``key=value`` over the checkpoint's configuration.
        """
        # The checkpoint is opened in this process alone; `_World.enter` refuses several processes.
        self._source = source_of(read_with_base(path, cure=MERGE_THEM))
        self._run = inference_run(self._source.run, overrides)
        validate_inference(self._run, 1)
        refuse_int8(self._run, "esm2mega.load")
        self._ranks = _world.enter()
        self._open = True
        try:
            self._model = load_model(self._source, self._run, self._ranks)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; it cannot be used any more."""
        if self._open:
            self._open = False
            self._model = None  # type: ignore[assignment]
            _world.leave()

    @overload
    def embed(
        self, sequences: Sequence[str], layers: int = -1, pooling: str | None = None
    ) -> list[Array] | Array: ...

    @overload
    def embed(
        self, sequences: Sequence[str], layers: Sequence[int], pooling: str | None = None
    ) -> dict[int, list[Array] | Array]: ...

    def embed(
        self, sequences: Sequence[str], layers: int | Sequence[int] = -1, pooling: str | None = None
    ) -> list[Array] | Array | dict[int, list[Array] | Array]:
        """Compute hidden states of every residue, or one vector per protein.

        Args:
            sequences: n sequences of residue letters.
            layers: One layer or several; 0 is the embedding, -1 the last layer after the final LayerNorm.
            pooling: None for residues; ``mean``, ``cls`` or ``max`` for one vector per protein.

        Returns:
            Without pooling a list of ``[L, h]``, with it ``[n, h]``; fp32 (fp64 for an fp64 model), without
            ``<cls>`` and ``<eos>``. For several layers a dictionary by the numbers that were given.
        """
        single = isinstance(layers, int | np.integer)
        asked = [int(layers)] if isinstance(layers, int | np.integer) else [int(layer) for layer in layers]
        kind = "residue" if pooling is None else "pooled"
        pooled = [] if pooling is None else [f"infer.pooling={pooling}"]
        values = self._values(sequences, f"infer.outputs=[{kind}]", f"infer.layers={asked}", *pooled)
        states = self._run.model.num_layers + 1  # type: ignore[operator]
        by_layer: dict[int, list[Array] | Array] = {}
        for layer in asked:
            arrays = [value[f"{kind}/layer_{layer % states}"] for value in values]
            by_layer[layer] = arrays if pooling is None else np.stack(arrays)
        return by_layer[asked[0]] if single else by_layer

    def logits(self, sequences: Sequence[str]) -> list[Array]:
        """Compute the logits of the 33 tokens at every residue, ``[L, v]`` for each protein."""
        return [value["logits"] for value in self._values(sequences, "infer.outputs=[logits]")]

    def contacts(self, sequences: Sequence[str]) -> list[Array]:
        """Compute contact probabilities ``[L, L]`` of each protein; the model needs a contact head."""
        return [value["contacts"] for value in self._values(sequences, "infer.outputs=[contacts]")]

    def score(
        self,
        sequence: str,
        variants: Sequence[str] | None = None,
        strategy: str = "masked-marginals",
        normalize: str = "vocabulary",
        offset: int = 1,
    ) -> dict[str, float]:
        """Score variants; a higher score means a more likely protein.

        Args:
            sequence: The wild type.
            variants: Variants in the forms of `esm2mega.data.variants.notation`, such as ``A24G``,
                ``A24G:D25N`` or ``p.Ala24Gly``; None for all single substitutions.
            strategy: ``wt-marginals``, ``masked-marginals`` or ``pseudo-ppl``, see
                `esm2mega.infer.strategies.STRATEGIES`.
            normalize: What probabilities add up to 1 over: the whole ``vocabulary``, or the 20 ``residues``.
            offset: Number of the first residue.

        Returns:
            The score of each variant, in nats.
        """
        for value, known, name in (
            (strategy, STRATEGIES, "strategy"),
            (normalize, NORMALIZATIONS, "normalize"),
        ):
            if value not in known:
                raise UserError(f"{name}={value} is not one of {', '.join(known)}")
        wild = clean(sequence)
        if variants is None:
            parsed = single_substitutions(wild)
            variants = [write_variant(variant, offset) for variant in parsed]
        else:
            parsed = [parse_variant(text, wild, offset, "offset") for text in variants]
        for text, variant in zip(variants, parsed, strict=True):
            try:
                check_variant(variant, wild, strategy, normalize)
            except UserError as error:
                raise UserError(f"{text!r}: {error}") from None
        self._source.check_lm_head()
        limits = Lengths.of(self._run.infer, self._run.data)
        size = micro_batch_tokens(self._run.infer, self._ranks.device)
        engine = Engine(self._loaded(), self._ranks, OutputRequest(logits=True), size)
        refused = partial(not_finite, checkpoint=self._source.path)
        marginals = Marginals(engine, self._ranks, limits.width, refused, normalize, shows_progress=False)
        scores = score_variants(marginals, wild, parsed, strategy)
        return dict(zip(variants, scores, strict=True))

    def _values(self, sequences: Sequence[str], *overrides: str) -> list[dict[str, Array]]:
        """Return the values that `Embedder` computes for each sequence, in input order."""
        texts = sequences_in_memory(sequences, self._run.data.sequence_column)
        run = load_run_over(self._run, overrides)
        validate_inference(run, 1)
        wants, limits = output_request(run.infer, run.model, self._source), Lengths.of(run.infer, run.data)
        size = micro_batch_tokens(run.infer, self._ranks.device)
        engine = Engine(self._loaded(), self._ranks, wants, size)
        residues = [encode_residues(clean(text)) for text in texts]
        results: list[dict[str, Array]] = [{} for _ in residues]
        embedder = Embedder(engine, run.infer, limits, self._source.path)
        named = "sequences[{}]".format
        for number, values in embedder.run(residues, named) if residues else ():
            # Copies: a view would keep the whole pack in memory.
            results[number] = {name: _array(in_memory(value)) for name, value in values.items()}
        return results

    def _loaded(self) -> Any:
        if not self._open:
            raise UserError("this model was closed; load it again")
        return self._model


def _array(value: Any) -> Array:
    wide = value.double() if value.element_size() == 8 else value.float()
    return wide.cpu().numpy().copy()
