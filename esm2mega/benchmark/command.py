"""Measures a machine, and writes what was measured as JSON, as a picture, and as lines for the terminal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from esm2mega.benchmark.contenders import Settings, absent_peers, embedders, trainers
from esm2mega.benchmark.machine import conditions, device
from esm2mega.benchmark.peers import MODULES
from esm2mega.benchmark.picture import draw_benchmark
from esm2mega.benchmark.products import forward_flops, model_flops
from esm2mega.benchmark.proteins import (
    Protein,
    draw,
    draw_batches,
    extract_batches,
    random_residues,
    read_proteins,
    uniref_lengths,
)
from esm2mega.benchmark.report import report_lines
from esm2mega.benchmark.sections import measure_contenders, measure_data, measure_machine, measure_steps
from esm2mega.config.launcher import world_size_from_environment
from esm2mega.config.presets import PRESETS
from esm2mega.convert.name_table import our_shapes
from esm2mega.doctor.devices import multiplies_bf16
from esm2mega.errors import UserError
from esm2mega.files import appearing, check_out, refuse_existing, replacing, write_json
from esm2mega.parallel.initialize import Ranks, process_groups

PRECISIONS = ("fp32", "bf16")

JSON_NAME, PICTURE_NAME = "benchmark.json", "benchmark.png"

MOST_READ = 20_000
"""Is how many proteins of a FASTA are read at most."""

MADE_UP_TOKENS = 630_000
"""Are made up where no FASTA is given, in some 2,000 proteins."""

BYTES_OF_TRAINING = 18
"""Are what a weight takes in training: itself, its gradient, moments of Adam, and a copy in fp32 for bf16."""


def settings_of(
    model: str,
    precisions: Sequence[str] | None,
    steps: int,
    rounds: int,
    tokens: int | None,
    seed: int,
    threads: int | None,
    has_peers: bool,
) -> Settings:
    """Check what a user asks for, and choose what is None by the device.

    Raises:
        UserError: There is no such model or precision.
    """
    on_gpu = device().type == "cuda"
    if model not in PRESETS:
        near = next((size for size in PRESETS if size.lower() == model.lower()), None)
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f"--model {model} is not one of {', '.join(PRESETS)}{hint}")
    for name in precisions or ():
        if name not in PRECISIONS:
            raise UserError(f"--precision {name} is not one of {', '.join(PRECISIONS)}")
    if precisions is None:
        precisions = PRECISIONS if multiplies_bf16() else PRECISIONS[:1]
    return Settings(
        model=model,
        precisions=list(dict.fromkeys(precisions)),
        steps=steps,
        rounds=rounds,
        tokens=tokens or (16384 if on_gpu else 4096),
        seed=seed,
        threads=threads or torch.get_num_threads(),
        has_peers=has_peers,
    )


def benchmark(settings: Settings, fasta: str | None, out: str, say: Callable[[str], object]) -> Iterator[str]:
    """Measure everything, and write JSON and picture; what is measured is not lost if something fails later.

    Args:
        settings: What is measured.
        fasta: Proteins; None for random residues with the lengths of UniRef90.
        out: Folder to make.
        say: Is told at the beginning which peers are left out.

    Yields:
        What to print, before anything is written: the disk may be full by then.

    Raises:
        UserError: The folder exists or cannot be made, the proteins cannot be read, or the models do not fit.
    """
    if (size := world_size_from_environment()) > 1:
        raise UserError(f"benchmark measures one process, not {size}; start it without torchrun")
    refuse_existing(Path(out))
    check_out(Path(out) / JSON_NAME)
    torch.set_num_threads(settings.threads)
    proteins = _proteins(settings, fasta)
    absent = absent_peers(settings, device())
    for name, reason in absent.items():
        say(f"{name} is left out: {reason}")
    present = [name for name in MODULES if settings.has_peers and name not in absent]
    _check_memory(settings, "transformers" in present)
    run = settings.run(settings.precisions[0])
    result: dict[str, Any] = {
        "conditions": conditions(),
        "settings": asdict(settings),
        "proteins": {
            "source": fasta or "made up, with the lengths of UniRef90",
            "read": len(proteins),
            "mean_tokens": sum(map(len, proteins)) / len(proteins) + 2,
        },
        "absent": absent,
    }
    sections: dict[str, Any] = {}
    try:
        with process_groups(run.parallel, run.seed) as ranks:
            for name, section in _measure(settings, proteins, present, ranks):
                sections[name] = section
    except BaseException as error:
        if sections:
            _write(
                result | sections | {"ended_by": " ".join(f"{type(error).__name__}: {error}".split())}, out
            )
            say(
                f"ended before the last section; the {len(sections)} before it are in {Path(out) / JSON_NAME}"
            )
        raise
    result |= sections
    yield from report_lines(result)
    _write(result, out)
    with replacing(Path(out) / PICTURE_NAME) as partial:
        draw_benchmark(result, partial)
    yield from ("", *(str(Path(out) / name) for name in (JSON_NAME, PICTURE_NAME)))


def _write(result: dict[str, Any], out: str) -> None:
    with appearing(Path(out)) as folder:
        write_json(folder / JSON_NAME, result)


def _proteins(settings: Settings, fasta: str | None) -> list[Protein]:
    longest = settings.max_seq_length
    if fasta is not None:
        return read_proteins(Path(fasta), longest - 2, MOST_READ)
    lengths = uniref_lengths(MADE_UP_TOKENS, settings.seed)
    return random_residues([min(length, longest) for length in lengths], settings.seed)


def _check_memory(settings: Settings, has_hugging_face: bool) -> None:
    """Refuse models that cannot be trained side by side; what they activate is not counted."""
    weights = sum(torch.Size(shape).numel() for shape in our_shapes(PRESETS[settings.model]).values())
    trained = len(settings.precisions) * (3 if has_hugging_face else 1)
    needed = BYTES_OF_TRAINING * weights * trained
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--model {settings.model}: {trained} of it in training take more than {needed / 1e9:.0f} GB, "
            f"and {free / 1e9:.0f} GB are free; give a smaller --model, one --precision, or leave --peers out"
        )


def _measure(
    settings: Settings, proteins: Sequence[Protein], present: Sequence[str], ranks: Ranks
) -> Iterator[tuple[str, Any]]:
    """Yield each section by its name, as soon as it is measured."""
    shape, rounds = PRESETS[settings.model], settings.rounds
    mean = sum(map(len, proteins)) / len(proteins) + 2
    number = max(1, min(len(proteins), round(settings.steps * settings.tokens / mean)))
    trained = draw(proteins, number, settings.seed)
    all_batches = len(extract_batches([len(protein) for protein in proteins]))
    batches = draw_batches(proteins, min(settings.steps, all_batches), settings.seed)

    machine, peaks = measure_machine(settings, ranks.device)
    yield "machine", machine
    with tempfile.TemporaryDirectory(prefix="esm2mega_") as folder:
        data, store = measure_data(settings, proteins, Path(folder))
        yield "data", data
        lengths = [len(protein) + 2 for protein in trained]
        training, failed = measure_contenders(
            "training",
            trainers(settings, trained, present, ranks),
            peaks,
            model_flops(shape, lengths) / sum(lengths),
            rounds,
        )
        yield "training", _contest(lengths, training, failed)
        embedded = [len(protein) + 2 for batch in batches for protein in batch]
        embedding, failed = measure_contenders(
            "embedding",
            embedders(settings, batches, present, ranks),
            peaks,
            forward_flops(shape, embedded, has_logits=False) / sum(embedded),
            rounds,
        )
        yield "embedding", _contest(embedded, embedding, failed)
        yield "steps", measure_steps(settings, store, ranks)


def _contest(lengths: Sequence[int], rows: list[dict[str, Any]], failed: dict[str, str]) -> dict[str, Any]:
    return {"proteins": len(lengths), "tokens": sum(lengths), "rows": rows, "failed": failed}
