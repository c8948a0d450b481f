"""`embed`: a file of proteins to a file of embeddings, by any number of processes, at once or in several
starts.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from esm2mega.config.infer import absolute_layers, inference_run, validate_inference, window_tokens
from esm2mega.config.schema import Run
from esm2mega.config.validate import world_size_from_environment
from esm2mega.data.store.cache import open_store
from esm2mega.data.store.token_store import TokenStore
from esm2mega.errors import UserError
from esm2mega.infer.contents import Contents
from esm2mega.infer.engine import Engine, load_model
from esm2mega.infer.proteins import Embedder, Lengths, micro_batch_tokens, output_request
from esm2mega.infer.source import ModelSource, open_model
from esm2mega.infer.target import OutputTarget
from esm2mega.infer.work import Journal, Work, differing, has_begun
from esm2mega.parallel.errors import on_one_rank
from esm2mega.parallel.initialize import Ranks, process_groups
from esm2mega.report.progress import Progress
from esm2mega.version import __version__
from esm2mega.vocabulary import TOKENIZER_HASH

_PREPARED = "prepared"
_IDS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class EmbedRequest:
    """What the user asks for.

    Attributes:
        checkpoint: A checkpoint or run directory.
        input: Sequences in any format of `esm2mega.data.readers.sources`, or a token store.
        out: Output; its ending decides the format.
        mode: One of `target.MODES`.
        overrides: `key=value` over the configuration.
        config: Configuration file or name; None for none.
        contact_maps: Folder for a PNG of each protein's contacts; None for none.
    """

    checkpoint: str
    input: str
    out: str
    mode: str = "new"
    overrides: Sequence[str] = ()
    config: str | None = None
    contact_maps: str | None = None


def embed(request: EmbedRequest) -> list[str]:
    """Compute and write embeddings; all ranks call this together.

    Returns:
        A report for the reader, the same on every rank.

    Raises:
        UserError: Bad input or settings, or an output that is there already.
    """
    source = open_model(request.checkpoint)
    run = inference_run(source.run, request.overrides, request.config)
    if request.contact_maps is not None and "contacts" not in run.infer.outputs:
        run.infer.outputs.append("contacts")
    validate_inference(run, world_size_from_environment())
    target = OutputTarget.of(request.out, run)
    output_request(run, source)  # here too, since the model's load takes time
    _check_existing(target, run, request.mode)
    with process_groups(run.parallel, run.seed) as ranks:
        begun = on_one_rank(lambda: _begin(request, run, source, target))
        if isinstance(begun, str):
            return [begun]
        attributes, store_path, remaining = begun
        contents = Contents(TokenStore(store_path), run, attributes)
        work = Work(target, contents)
        _compute(work, source, ranks, remaining[ranks.dp_rank :: ranks.dp_size], request.contact_maps)
        dist.barrier()
        made = on_one_rank(work.finish)
        return _report(contents, made)


def _check_existing(target: OutputTarget, run: Run, mode: str) -> None:
    """Refuse to touch what is there, unless told how to; and a folder of somebody else's in any case."""
    for path in target.existing(run.infer.outputs):
        if path.is_dir() and any(path.iterdir()) and not target.attributes(path):
            raise UserError(f"{path}: is a folder that `embed` did not write; choose another --out")
        if mode == "new":
            raise UserError(f"{path}: exists; replace it with --overwrite, or choose another --out")
    if mode == "new" and has_begun(target):
        raise UserError(
            f"{target.work_dir}: an unfinished output of an earlier start; go on with --resume, or "
            "begin again "
            "with --overwrite"
        )


def _begin(
    request: EmbedRequest, run: Run, source: ModelSource, target: OutputTarget
) -> tuple[dict[str, Any], Path, list[int]] | str:
    """Prepare everything that processes share; by one process.

    Returns:
        Attributes, where the proteins are, and the pieces to compute; or one line why there is nothing to do.
    """
    if request.contact_maps is not None:
        _make_folder(Path(request.contact_maps), f"--contact-maps {request.contact_maps}")
    begun = has_begun(target)
    if not begun or request.mode == "overwrite":
        if target.work_dir.exists():
            shutil.rmtree(target.work_dir)
        _make_folder(target.work_dir, f"--out {target.out}")
    try:
        run.data.cache_dir = str(target.work_dir / _PREPARED)
        store = open_store(request.input, run, "input")
        _check_lengths(store, run, request.input)
        attributes = _attributes(store, run, source)
        if request.mode == "resume" and (finished := target.existing(run.infer.outputs)) and not begun:
            differences = differing(target.attributes(finished[0]), attributes)
            if differences:
                raise UserError(
                    f"{finished[0]}: exists and is of other settings: {differences}; replace it with "
                    "--overwrite"
                )
            shutil.rmtree(target.work_dir)
            return f"{finished[0]} is complete"
        return attributes, store.path, Work(target, Contents(store, run, attributes)).begin()
    except BaseException:
        if not begun:
            shutil.rmtree(target.work_dir, ignore_errors=True)
        raise


def _make_folder(path: Path, named: str) -> None:
    """Args: named: the path for the reader, with the option that gives it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{named}: cannot be written: {error.strerror or error}; choose another path"
        ) from error


def _check_lengths(store: TokenStore, run: Run, name: str) -> None:
    """Refuse long proteins unless told what to do with them."""
    limits = Lengths.of(run)
    too_long = np.flatnonzero(store.lengths > limits.most_residues)
    if len(too_long) and limits.too_long == "error":
        first = int(too_long[0])
        others = f" and {len(too_long) - 1:,} others" if len(too_long) > 1 else ""
        raise UserError(
            f"{name}: {store.id(first)!r} (number {first + 1:,}) has {store.lengths[first]:,} "
            f"residues{others}, "
            f"more than the {limits.most_residues:,} that the model sees at once; set --too-long crop "
            "or --too-long chunk, or raise --max-seq-length"
        )


def _attributes(store: TokenStore, run: Run, source: ModelSource) -> dict[str, Any]:
    """What decides the content of the output."""
    ids = hashlib.sha256()
    for first in range(0, len(store), _IDS_AT_ONCE):
        text, lengths = store.encoded_ids(first, min(first + _IDS_AT_ONCE, len(store)))
        ids.update(text + lengths.tobytes())
    infer = run.infer
    return {
        "esm2mega_version": __version__,
        "model_hash": source.checksum(),
        "tokenizer_hash": TOKENIZER_HASH,
        "sequences_hash": store.fingerprint,
        "ids_hash": ids.hexdigest(),
        "outputs": sorted(infer.outputs),
        "layers": absolute_layers(run),
        "pooling": infer.pooling,
        "dtype": infer.dtype,
        "precision": run.model.precision,
        "tensor_model_parallel_size": run.parallel.tensor_model_parallel_size,
        "layout": infer.layout,
        "too_long": infer.too_long,
        "max_seq_length": window_tokens(run),
        "overlap": Lengths.of(run).overlap if infer.too_long == "chunk" else 0,
    }


def _compute(
    work: Work, source: ModelSource, ranks: Ranks, pieces: Sequence[int], contact_maps: str | None
) -> None:
    """This rank's share of the pieces."""
    contents, run = work.contents, work.contents.run
    size = micro_batch_tokens(run, ranks.device)
    engine = Engine(load_model(source, run, ranks), ranks, output_request(run, source), size)
    embedder = Embedder(engine, run)
    # Ranks of a tensor-parallel group hold the same; one of them writes. Pipeline stages write what is
    # theirs.
    writes = ranks.tp_rank == 0
    total = sum(len(work.proteins(piece)) for piece in pieces)
    with work.open_arrays() as arrays, Progress(total, "embed", "protein", enabled=ranks.is_main) as progress:
        journal = Journal(work.folder, ranks.rank, arrays)
        for piece in pieces:
            numbers = work.proteins(piece)
            residues = [contents.store.residues(number) for number in numbers]
            for location, values in embedder.run(residues) if residues else ():
                if writes:
                    for name, row, rows in contents.stored(numbers[location], values):
                        arrays.write(name, row, rows)
                    if contact_maps is not None and "contacts" in values:
                        _draw(
                            contact_maps,
                            numbers[location],
                            contents.store.id(numbers[location]),
                            values["contacts"],
                        )
                progress.update(1)
            if ranks.pp_size > 1:
                # A piece is done when every stage has written its layers.
                arrays.sync()
                dist.barrier(group=_model_group())
            if writes and ranks.pp_rank == 0:
                journal.add(piece)
        journal.flush()


def _model_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_model_parallel_group()


def _draw(folder: str, number: int, protein: str, contacts: Any) -> None:
    from esm2mega.infer.exports import safe_name
    from esm2mega.infer.figures import contact_map

    contact_map(
        Path(folder) / f"{number:06d}.{safe_name(protein)}.png", protein, contacts.float().cpu().numpy()
    )


def _report(contents: Contents, made: Sequence[Path]) -> list[str]:
    """What was written, and everything that is not simply a protein as it was given."""
    total = int(contents.offsets[-1])
    lines = [f"{', '.join(map(str, made))}: {len(contents):,} proteins, {total:,} residues"]
    if cropped := int(contents.truncated.sum()):
        lost = int(contents.store.lengths.sum(dtype=np.int64)) - total
        lines.append(
            f"{cropped:,} proteins were cropped by {lost:,} residues in all; they are marked truncated"
        )
    if chunked := int((contents.num_windows > 1).sum() if contents.run.infer.too_long == "chunk" else 0):
        lines.append(f"{chunked:,} proteins are means over overlapping windows; see num_windows")
    if "contacts" in contents.specs and chunked:
        lines.append("contacts between residues that no window holds together are NaN")
    return lines
