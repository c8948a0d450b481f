"""Describes what a path holds: a token store, tables, an output, a run, or a checkpoint with all tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from esm2mega.config.hub import cached, how_to_fetch
from esm2mega.config.run_name import split_run
from esm2mega.errors import UserError

_HDF5 = (".h5", ".hdf5")
_MOST_SHOWN = 20


def inspect_path(path: str | Path, verify: bool = False) -> str:
    """Describe `path` in lines for a reader.

    Args:
        path: Token store, tables, run or checkpoint.
        verify: Whether to list all files of a token store or a checkpoint, which are compared with their
            checksums; another checkpoint is not taken for a damaged one.

    Raises:
        UserError: The path holds nothing that is known, or it is damaged.
    """
    run, which = split_run(path)
    directory = cached(run) or Path(run)
    if not directory.exists():
        cure = how_to_fetch(run) or "give a token store, a run directory or a checkpoint"
        raise UserError(f"{path}: no such path; {cure}")
    if which is not None:
        return "\n".join(_checkpoint_lines(path, verify))
    if (directory / "manifest.json").is_file():
        from esm2mega.data.benchmarks.tables import read_manifest

        tables = read_manifest(directory)
        if tables is not None:
            _refuse_to_verify(directory, verify)
            return "\n".join(_table_lines(directory, tables))
        return "\n".join(_store_lines(directory, verify))
    if stores := sorted(str(path.parent) for path in directory.glob("*/manifest.json")):
        raise UserError(f"{path}: holds token stores but is none itself; did you mean {' or '.join(stores)}?")
    from esm2mega.convert.files.source import SourceFiles
    from esm2mega.convert.formats.registry import detect, find_format
    from esm2mega.convert.start_point import OWN

    if directory.is_file() and directory.suffix.lower() in _HDF5:
        return "\n".join(_output_lines(directory))
    source = SourceFiles(directory)
    if not directory.is_dir() or find_format(source) not in (None, OWN):
        _refuse_to_verify(directory, verify)
        return "\n".join(_foreign_lines(source, detect(source)))
    return "\n".join(_checkpoint_lines(directory, verify))


def _refuse_to_verify(directory: Path, verify: bool) -> None:
    if verify:
        raise UserError(
            f"{directory}: --verify is for token stores and checkpoints of esm2mega; without it, inspect "
            "reads every tensor or checks every table"
        )


def _table_lines(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Describe the tables of `esm2mega prepare flip`, `tape` and `deeploc2`."""
    yield f"tables {directory} of {manifest['benchmark']} (format {manifest['version']}, checksums hold)"
    for key in ("task", "split", "kind"):
        if key in manifest:
            yield f"{key} {manifest[key]}"
    for name, value in manifest.get("options", {}).items():
        yield f"option {name} {value}"
    for split, entry in manifest["splits"].items():
        yield (
            f"  {split:<8} {entry['proteins']:,} proteins, {entry['residues']:,} residues, "
            f"longest {entry['longest']:,}"
        )
        total = max(sum(entry.get("classes", {}).values()), 1)
        for name, count in entry.get("classes", {}).items():
            yield f"    {name:<22} {count:>12,}  {100 * count / total:6.2f} %"
    for name, digest in manifest["sources"].items():
        yield f"source {name}  sha256 {digest}"
    yield from manifest["notes"]


def _task_lines(head: Any) -> Iterator[str]:
    """Describe the head of a task, a `HeadDescription`, and what its outputs mean."""
    from esm2mega.config.head_form import head_form
    from esm2mega.data.labels.forms import SAID

    info, code = head.info, head.code
    own = None if code is None else code.head
    described = " ".join(head_form(head.task)) if own is None else own
    yield f"task {info.kind}, head {described}, {info.num_outputs} outputs"
    if code is not None and code.model is not None:
        yield f"model {code.model}"
    # Checkpoints of earlier versions do not say.
    for column, form in zip(head.task.target_columns, info.forms, strict=False):
        yield f"column {column} held {SAID[form]}"
    if code is not None and code.loss is not None:
        predicts = ", which turns outputs into predictions" if code.loss_predicts else ""
        yield f"loss {code.loss}{predicts}"
    for number, name in enumerate(info.output_names):
        described = [f"output {number} {name}"]
        if info.counts:
            described.append(f"{info.counts[number]:,} training labels")
        if info.mean:
            described.append(f"mean {info.mean[number]:.6g}, std {info.std[number]:.6g}")
        yield ", ".join(described)


def _store_lines(directory: Path, verify: bool) -> Iterator[str]:
    from esm2mega.data.store.token_store import TokenStore
    from esm2mega.vocabulary import VOCAB

    store = TokenStore(directory)
    store.verify()
    yield f"token store {directory} (format {store.manifest['format_version']}, checksums hold)"
    if not store.is_sealed:
        yield "its manifest is of an earlier version and has no checksum of its own"
    yield f"{len(store):,} sequences, {int(store.lengths.sum()):,} residues"
    if len(store):
        low, high, mean = store.lengths.min(), store.lengths.max(), store.lengths.mean()
        yield f"lengths {low:,} to {high:,}, mean {mean:.1f} residues"
    if store.clusters is not None:
        yield f"{len(store.clusters):,} clusters of {len(store.clusters.members):,} members"
    for source in store.manifest["sources"]:
        yield f"source {source['name']}  sha256 {source['sha256']}"
    total = max(int(store.token_counts.sum()), 1)
    counted = [(VOCAB[token], count) for token, count in enumerate(store.token_counts.tolist()) if count]
    for token, count in sorted(counted, key=lambda pair: -pair[1]):
        yield f"  {token:<8} {count:>16,}  {100 * count / total:6.3f} %"
    yield f"tokenizer {store.manifest['tokenizer_hash']}"
    if verify:
        yield from _verified_lines(store.manifest["files"])


def _output_lines(path: Path) -> Iterator[str]:
    """Describe an output of `embed` or `predict`, after comparing it with its checksums."""
    from esm2mega.infer.hdf5 import describe
    from esm2mega.infer.hdf5_checksums import verify

    has_checksums = verify(path)
    attributes, shapes = describe(path)
    said = "checksums hold" if has_checksums else "without checksums: an earlier version, or another program"
    yield f"HDF5 {path} ({said})"
    for name, value in attributes.items():
        yield f"attribute {name} {value}"
    for name, kind in list(shapes.items())[:_MOST_SHOWN]:
        yield f"  {name:<30} {kind}"
    if len(shapes) > _MOST_SHOWN:
        yield f"  and {len(shapes) - _MOST_SHOWN:,} more data sets"


def _foreign_lines(source: Any, name: str) -> Iterator[str]:
    """Describe a checkpoint of another program, with its tensors under our names.

    Args:
        source: Its files.
        name: The format that it is in.
    """
    from esm2mega.checkpoint.finite import FiniteCheck
    from esm2mega.checkpoint.tensors import combined_sha256, tensor_sha256
    from esm2mega.convert.formats.registry import read_weights
    from esm2mega.convert.lazy_weights import dtype_name

    weights = read_weights(source, name)
    description = weights.description
    yield f"checkpoint {source.path} in the format {name}, which `esm2mega convert` reads"
    yield f"model {description.shape}, {dtype_name(description.dtype)}, family {description.family}"
    if description.head != "lm":
        task = description.task
        yield "no head" if task is None else f"head of a task (task.kind={task.task.kind})"
    yield from weights.notes.lines()
    digests, finite = [], FiniteCheck()
    for tensor, info in weights.infos.items():
        digests.append((tensor, tensor_sha256(finite.add(tensor, weights.read(tensor)))))
        yield f"  {tensor:<58} {dtype_name(info.dtype):<9} {list(info.shape)!s:<18} {digests[-1][1][:16]}"
    yield f"tensors sha256 {combined_sha256(digests)}"
    yield finite.words()


def _verified_lines(files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """List files that agree with their checksums."""
    for name, entry in files.items():
        yield f"verified {name:<40} {entry['bytes']:>16,} bytes  sha256 {entry['sha256'][:16]}"


def _checkpoint_lines(named: str | Path, verify: bool) -> Iterator[str]:
    from esm2mega.checkpoint import layout
    from esm2mega.checkpoint.auxiliary import read_auxiliary
    from esm2mega.checkpoint.choice import best_checkpoint, choose_checkpoint
    from esm2mega.checkpoint.digests import DIGESTS, read_digests
    from esm2mega.checkpoint.finite import FiniteCheck
    from esm2mega.checkpoint.tensor_filter import OPTIMIZER
    from esm2mega.checkpoint.tensors import TensorReader, combined_sha256, tensor_sha256
    from esm2mega.config.presets import shape_of
    from esm2mega.convert.formats.esm2mega import task_head
    from esm2mega.convert.start_point import read_checkpoint

    start = read_checkpoint(choose_checkpoint(named).path if verify else named)
    checkpoint, run, state = start.path, start.run, start.state
    shape, reader = shape_of(run.model), TensorReader(checkpoint)
    yield f"checkpoint {checkpoint} (format {state['format_version']}, esm2mega {state['esm2mega_version']})"
    yield (f"model {run.model.size or 'own shape'}: {shape}, {run.model.precision}")
    loss = "not evaluated" if state["valid_loss"] is None else f"{state['valid_loss']:.4f}"
    data = state["data"]
    if data is None:
        yield f"converted from {state['origin']['format']} {state['origin']['path']}"
    else:
        yield (
            f"step {state['step']:,}, {data['consumed_samples']:,} samples, "
            f"{data['consumed_tokens']:,} tokens, validation loss {loss}"
        )
    run_dir = checkpoint.parent.parent
    if len(others := layout.find_checkpoints(run_dir)[0]) > 1:
        best = best_checkpoint(run_dir)
        words = "" if best is None else f"; the best {best}: {best.path.name}"
        yield f"checkpoints of the run: {', '.join(p.name for p in others)}{words}"
    if "base" in state:
        yield f"adapters of rank {run.lora.rank} on {', '.join(run.lora.target_modules)}"
        yield f"base {state['base']['path']}  sha256 {state['base']['sha256']}"
    if state.get("task") is not None:
        yield from _task_lines(task_head(run.task, state, {}, checkpoint))
    digests: list[tuple[str, str]] = []
    finite = FiniteCheck()
    for name, info in reader.index.items():
        if name.startswith(OPTIMIZER):
            continue
        digest = tensor_sha256(finite.add(name, reader.read(name)))
        digests.append((name, digest))
        dtype = str(info.dtype).removeprefix("torch.")
        yield f"  {name:<58} {dtype:<9} {list(info.shape)!s:<18} {digest[:16]}"
    yield f"weights sha256 {combined_sha256(digests)}"
    for name, value in read_auxiliary(checkpoint).items():
        finite.add(name, value)
        yield f"auxiliary {name} {list(value.shape)}"
    yield finite.words()
    optimizer = [info for name, info in reader.index.items() if name.startswith(OPTIMIZER)]
    if optimizer:
        yield f"optimizer: {len(optimizer)} tensors, {sum(i.num_bytes for i in optimizer) / 1e9:.3f} GB"
    if verify:
        entries = read_digests(checkpoint)
        yield from _verified_lines(entries or {})
        own = f"{layout.STATE}, {DIGESTS} and {layout.COMPLETE}"
        yield "nothing verified: no digests" if entries is None else f"verified {own}, which hold checksums"
