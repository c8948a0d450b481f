"""`embed` turns a file of proteins into a file of embeddings, with any number of processes and starts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esm2mega.config.batches import sizes_that_round
from esm2mega.config.infer import (
    absolute_layers,
    in_int8,
    inference_run,
    validate_inference,
    validate_int8,
)
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.load import values_of
from esm2mega.convert.start_point import asks_to_verify
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError
from esm2mega.infer.contents import Write
from esm2mega.infer.drift import Drift, measured, sample
from esm2mega.infer.embedding_target import EmbeddingTarget
from esm2mega.infer.embeddings import STORED, Embeddings
from esm2mega.infer.engine import Engine, OutputRequest, load_model
from esm2mega.infer.job import Compute, Job, make_folder, refuse_long, run_job
from esm2mega.infer.maps import cells
from esm2mega.infer.memory import need_of, used_bytes
from esm2mega.infer.proteins import Embedder, Lengths, Values, micro_batch_tokens, output_request
from esm2mega.infer.source import open_model
from esm2mega.infer.target import Mode
from esm2mega.model.arithmetic import describe_computing
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.kernels.int8 import check_products, quantize
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks
from esm2mega.parallel.paths import expand_paths


@dataclass(frozen=True)
class EmbedRequest:
    """Holds what the user asks for.

    Attributes:
        checkpoint: A checkpoint or run directory.
        input: Sequences in any format of `esm2mega.data.readers.sources`, or a token store.
        out: Output; its ending decides the format.
        mode: What to do about an output that exists already.
        overrides: `key=value` over the configuration.
        config: Configuration file or name; None for none.
        contact_maps: Folder for a PNG of each protein's contacts; None for none.
    """

    checkpoint: str
    input: str
    out: str
    mode: Mode = "new"
    overrides: Sequence[str] = ()
    config: str | None = None
    contact_maps: str | None = None


def embed(request: EmbedRequest) -> list[str]:
    """Compute and write embeddings; all ranks call this together.

    Returns:
        A report for the reader, the same on every rank.

    Raises:
        UserError: The input or the settings are not valid, or the output exists already.
    """
    return run_job(EmbedJob(request))


class EmbedJob(Job):
    """Computes hidden states, logits and contacts, protein by protein."""

    name = "embed"
    unit = "protein"

    def __init__(self, request: EmbedRequest) -> None:
        """Open the checkpoint; refuse a request that does not fit its model.

        Args:
            request: What the user asks for.

        Raises:
            UserError: The request is not valid, or does not fit the model.
        """
        (base,) = values_of(["init_from"], request.config, request.overrides)
        verify = asks_to_verify(request.overrides, request.config)
        self._source = open_model(request.checkpoint, base, verify)
        self._contact_maps = request.contact_maps
        run = expand_paths(inference_run(self._source.run, request.overrides, request.config))
        if request.contact_maps is not None and "contacts" not in run.infer.outputs:
            run.infer.outputs.append("contacts")
        validate_inference(run, world_size_from_environment())
        if in_int8(run):
            validate_int8(run)
            check_products()
        super().__init__(
            request.input, request.mode, run, EmbeddingTarget.of(request.out, run.infer, run.model)
        )
        self._request = output_request(run.infer, run.model, self._source)
        self._limits = Lengths.of(run.infer, run.data)
        self._drift: Drift | None = None

    def check(self, store: TokenStore) -> None:
        if self._contact_maps is not None:
            make_folder(Path(self._contact_maps), f"--contact-maps {self._contact_maps}")
        if self._limits.too_long == "error":
            refuse_long(
                store, self._limits.most_residues, self.input, "set --too-long crop or --too-long chunk"
            )

    def checksum(self) -> str:
        return self._source.checksum()

    def settings(self) -> dict[str, Any]:
        run, infer = self.run, self.run.infer
        return {
            "outputs": sorted(infer.outputs),
            "layers": absolute_layers(infer, run.model),
            "pooling": infer.pooling,
            "dtype": infer.dtype,
            "precision": "int8" if in_int8(run) else run.model.precision,
            **sizes_that_round(run.parallel),
            "layout": infer.layout,
            "too_long": infer.too_long,
            "max_seq_length": self._limits.width,
            "overlap": self._limits.overlap if infer.too_long == "chunk" else 0,
            # Only where there is some: outputs of earlier versions are found to be the same.
            **({} if infer.compression == "none" else {"compression": infer.compression}),
        }

    def contents(self, store: TokenStore, attributes: dict[str, Any]) -> Embeddings:
        return Embeddings(store, attributes, self.run.infer, self.run.model, self._limits)

    def load(self, contents: Embeddings, ranks: Ranks) -> Compute:
        size = micro_batch_tokens(self.run.infer, ranks.device)
        model = load_model(self._source, self.run, ranks)
        self.computing = describe_computing(model.config, ranks.device, self._source.run.model.precision)
        if in_int8(self.run):
            self.computing += "; products of the layers in int8"
            self._drift = self._quantized(model, contents, ranks)
        self._say_need(contents, size, ranks)
        engine = Engine(model, ranks, self._request, size, self.target.work_dir)
        embedder = Embedder(engine, self.run.infer, self._limits, self._source.path)

        def compute(piece: int) -> Iterator[tuple[int, Iterable[Write]]]:
            numbers = contents.proteins(piece)
            residues = [contents.store.residues(number) for number in numbers]

            def named(location: int) -> str:
                return contents.store.id(numbers[location])

            for location, values in embedder.run(residues, named) if residues else ():
                number = numbers[location]
                yield 1, contents.stored(number, values)
                if ranks.is_output_rank:
                    self._draw(number, contents.store.id(number), values)

        return compute

    def _say_need(self, contents: Embeddings, size: int, ranks: Ranks) -> None:
        """Say on rank 0 what memory and disk a protein takes that is longer than an ordinary pack."""
        window = min(int(contents.lengths.max()) + 2, self._limits.width)
        if window <= size or not ranks.is_main:
            return
        stored = np.dtype(STORED[self.run.infer.dtype]).itemsize
        windows = int(contents.num_windows.max())
        need = need_of(self.run.model, self._request, window, windows, ranks.tp_size, ranks.cp_size, stored)
        memory = (used_bytes(ranks.device) + need.memory) / 1e9
        disk = f", and {need.disk / 1e9:.1f} GB of disk while contacts are computed" if need.disk else ""
        print(
            f"{window:,} tokens pass at once: every process needs about {memory:.1f} GB of memory{disk}",
            file=sys.stderr,
            flush=True,
        )

    def _quantized(self, model: ESM2Model, contents: Embeddings, ranks: Ranks) -> Drift | None:
        """Let the model multiply in int8; rank 0 measures the drift for all ranks, of which each gets it.

        Raises:
            UserError: The drift is above the bound.
        """
        if ranks.device.type != "cpu":
            raise UserError(
                f"--precision int8 is for CPUs, and this computes on {ranks.device.type}; use "
                "--precision bf16, or hide the GPU with CUDA_VISIBLE_DEVICES="
            )
        if not ranks.is_main:
            quantize(model)

        def measure() -> Drift | None:
            layers = self._request.layers or (len(model.encoder.layers),)
            wants = OutputRequest(layers, logits=self._source.has_lm_head)
            engine = Engine(model, ranks, wants, micro_batch_tokens(self.run.infer, ranks.device))
            proteins = sample(contents.store, self._limits.most_residues)
            drift = measured(engine, proteins, self._source.has_lm_head, lambda: quantize(model))
            if drift is not None:
                drift.check(self.run.infer.max_drift)
            return drift

        return on_one_rank(measure)

    def _draw(self, number: int, protein: str, values: Values) -> None:
        if self._contact_maps is None or "contacts" not in values:
            return
        from esm2mega.infer.exports import safe_name
        from esm2mega.infer.figures import MOST_CELLS, contact_map

        path = Path(self._contact_maps) / f"{number:06d}.{safe_name(protein)}.png"
        contacts = values["contacts"]
        drawn = cells(contacts, MOST_CELLS).float().cpu().numpy()
        contact_map(path, protein, drawn, contacts.shape[0])

    def report(self, contents: Embeddings, made: Sequence[Path]) -> list[str]:
        """Say what was written, and which proteins were cropped or are means over windows."""
        total = int(contents.offsets[-1])
        lines = [f"{', '.join(map(str, made))}: {len(contents):,} proteins, {total:,} residues"]
        if self._drift is not None:
            lines.append(f"int8 beside fp32: {self._drift}")
        if cropped := int(contents.truncated.sum()):
            lost = int(contents.store.lengths.sum(dtype=np.int64)) - total
            lines.append(
                f"{cropped:,} proteins were cropped by {lost:,} residues in all; they are marked truncated"
            )
        chunks = self.run.infer.too_long == "chunk"
        if chunked := int((contents.num_windows > 1).sum() if chunks else 0):
            lines.append(f"{chunked:,} proteins are means over overlapping windows; see num_windows")
        if "contacts" in contents.specs and chunked:
            lines.append("contacts between residues that no window holds together are NaN")
        return lines
