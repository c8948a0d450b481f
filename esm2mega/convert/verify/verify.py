"""Verifies a conversion: runs both models on the same sequences, and compares every tensor.

Our model runs as it does in training, in one process on the CPU in fp32. A foreign model runs in its own
package if that is installed (transformers, fair-esm), else in `esm2mega.convert.verify.plain_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esm2mega.batch import Segments
from esm2mega.checkpoint.tensors import tensor_sha256
from esm2mega.convert.convert import Conversion
from esm2mega.convert.files.iupac import ESM_ONLY, TAPE_TOKENS, esm_ids
from esm2mega.convert.files.stores import without_shared_prefix
from esm2mega.convert.formats.fair_esm import open_file
from esm2mega.convert.formats.hf import open_tensors
from esm2mega.convert.formats.registry import open_weights
from esm2mega.convert.heads.contact_head import BIAS, WEIGHT, is_contact_head, with_published_head
from esm2mega.convert.heads.hf_classifiers import architecture_of
from esm2mega.convert.lazy_weights import Description, Weights, dtype_name
from esm2mega.convert.verify import plain_model
from esm2mega.convert.verify.esm2_weights import read_plain_model
from esm2mega.convert.verify.source import Prepare
from esm2mega.data.labels.schema import TargetInfo
from esm2mega.errors import MachineError, UserError
from esm2mega.files import write_json
from esm2mega.model.build import DTYPES
from esm2mega.vocabulary import CLS, EOS, MASK, encode_residues

BOUND = 1e-5
"""This is the largest allowed difference of logits, relative to the largest logit. It allows for fp32 sums in
another order over the 48 layers of the largest model.
"""

_SEQUENCES = (
    "M",
    # ubiquitin
    "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "KALTARXBUZOGKAM.A-LVPRGSHMWYCFNQDEJHIST",
    "".join("LAGVSERTIDPKQNFYMHWC"[(7 * i * i + 3 * i) % 20] for i in range(340)),
)
"""These are one residue, a real protein, every rare letter, and over 256 tokens, where rotary errors show."""

Result = tuple[list[Tensor], Tensor]
"""A result holds hidden states ``[s, h]`` (embedding, each block, the last normalised) and logits ``[s, v]``.
Instead of logits, a task has its outputs, ``[1, k]`` for the protein, ``[s - 2, k]`` for its residues or
``[P, 1]`` for their pairs, and a bare encoder has the last hidden states.
"""


def sequences(family: str = "esm2") -> list[Tensor]:
    """Return token ids, int64 ``[s]`` each; in every second sequence, every seventh residue is masked.

    Args:
        family: Family of the model; X replaces letters that its vocabulary does not have.
    """
    result = []
    for number, residues in enumerate(_SEQUENCES):
        if family != "esm2":
            residues = "".join("X" if letter in ESM_ONLY else letter for letter in residues)
        ids = torch.tensor([CLS, *encode_residues(residues).tolist(), EOS])
        if number % 2:
            ids[7:-1:7] = MASK
        result.append(ids)
    return result


def _sequences_for(description: Description) -> list[Tensor]:
    """Return `sequences` that a model with learned positions can take; ``<eos>`` stays the last token."""
    ids = sequences(description.family)
    if description.max_positions is None:
        return ids
    last = description.max_positions - 1
    return [x if len(x) <= last else torch.cat((x[:last], x[-1:])) for x in ids]


def difference_of_models(conversion: Conversion, precision: str) -> float:
    """Return the largest difference of the outputs of both models, relative to the largest output.

    Args:
        conversion: What was converted.
        precision: Precision to compute in, as in `model.precision`.
    """
    description = conversion.description

    def prepare(value: Tensor) -> Tensor:
        return value.to(description.dtype).to(DTYPES[precision])

    ids = _sequences_for(description)
    both = [
        _run(path, name, prepare, ids, description, precision)[0]
        for path, name in (
            (conversion.source, conversion.source_format),
            (conversion.target, conversion.target_format),
        )
    ]
    return _difference(*([outputs for _, outputs in results] for results in both))["relative"]


def verify(conversion: Conversion) -> list[str]:
    """Compare source and target, and write ``TARGET.verify.json`` beside the target.

    Returns:
        Lines of a report for the user.

    Raises:
        MachineError: The logits differ by more than `BOUND`, or contact heads differ at all.
    """
    description = conversion.description
    dtype = description.dtype

    def prepare(value: Tensor) -> Tensor:
        # Rounded like the target's weights, so that the conversion is compared and not the rounding.
        return value.to(dtype).float()

    ids = _sequences_for(description)
    source_results, source_method = _run(
        conversion.source, conversion.source_format, prepare, ids, description
    )
    target_results, target_method = _run(
        conversion.target, conversion.target_format, prepare, ids, description
    )
    logits = _difference([logits for _, logits in source_results], [logits for _, logits in target_results])
    hidden = [
        _difference([h[n] for h, _ in source_results], [h[n] for h, _ in target_results])
        for n in range(len(source_results[0][0]))
    ]
    tensors = _tensors(
        _as_published(open_weights(conversion.source, conversion.source_format, conversion.drop).cast(dtype)),
        _as_published(open_weights(conversion.target, conversion.target_format)),
    )
    contact_head = _contact_head(tensors)
    passed = logits["relative"] <= BOUND and contact_head != "different"
    report = {
        "source": {
            "format": conversion.source_format,
            "path": str(conversion.source),
            "run_by": source_method,
        },
        "target": {
            "format": conversion.target_format,
            "path": str(conversion.target),
            "run_by": target_method,
        },
        "passed": passed,
        "bound": BOUND,
        "sequence_lengths": [len(x) for x in ids],
        "logits": logits,
        "hidden_states": hidden,
        "weights_dtype": dtype_name(dtype),
        "notes": asdict(conversion.notes),
        "contact_head": contact_head,
        "tensors": tensors,
    }
    path = conversion.target.with_name(f"{conversion.target.name}.verify.json")
    write_json(path, report)
    line = (
        f"logits differ by {logits['max_abs']:.2e}, {logits['relative']:.1e} of the largest "
        f"(bound {BOUND:g}); contact head: {contact_head}; report: {path}"
    )
    if not passed:
        reasons = "; ".join(conversion.notes.changed) or "no change is known that would explain it"
        raise MachineError(f"verification failed: {line}; {reasons}")
    return [f"source run by {source_method}, target by {target_method}", line]


def _difference(source: list[Tensor], target: list[Tensor]) -> dict[str, float]:
    """Return the largest difference over all sequences, absolute and relative to the source's largest value.

    Raises:
        MachineError: A value is not finite.
    """
    if not all(bool(x.isfinite().all()) for x in (*source, *target)):
        raise MachineError("verification failed: the models give values that are not finite")
    # A protein of one residue has no pairs.
    pairs = [(a, b) for a, b in zip(source, target, strict=True) if a.numel() or b.numel()]
    scale = max(float(a.abs().max()) for a, _ in pairs)
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    return {"max_abs": largest, "relative": largest / scale if scale else largest, "scale": scale}


def _tensors(source: Weights, target: Weights) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of the tensors of both, under our names; a tensor that one lacks is ``none``."""
    return {
        name: {"source": _checksum(source, name), "target": _checksum(target, name)}
        for name in {**source.infos, **target.infos}
    }


def _as_published(weights: Weights) -> Weights:
    """Move a contact head that was trained as the head of a task to the place where other formats have it."""
    return with_published_head(weights) if is_contact_head(weights.description.task) else weights


def _contact_head(tensors: Mapping[str, Mapping[str, str]]) -> str:
    """Return whether both have the same contact head, which neither logits nor hidden states show."""
    pairs = [tensors[name] for name in (WEIGHT, BIAS) if name in tensors]
    if not pairs or any("none" in pair.values() for pair in pairs):
        return "not in both"
    return "equal" if all(pair["source"] == pair["target"] for pair in pairs) else "different"


def _checksum(weights: Weights, name: str) -> str:
    if name not in weights.infos:
        return "none"
    return tensor_sha256(weights.read(name))


def _run(
    path: Path,
    format_name: str,
    prepare: Prepare,
    ids: list[Tensor],
    description: Description,
    precision: str = "fp32",
) -> tuple[list[Result], str]:
    """Return the results of every sequence, and the name of the program that computed them."""
    if format_name == "esm2mega":
        return _esm2mega(path, prepare, ids, description, precision), "esm2mega"
    if format_name == "hf" and _is_as_transformers_writes(path) and (found := _installed("transformers")):
        with _ran_by(found, path):
            results, method = _transformers(path, prepare, ids, description), found
    # The package is looked up, not its module esm, since another package has a module of that name.
    elif format_name == "fair-esm" and open_file(path).is_whole and (found := _installed("fair-esm")):
        with _ran_by(found, path):
            results, method = _fair_esm(path, prepare, ids), found
    else:
        model = read_plain_model(path, format_name, prepare)
        results, method = [plain_model.forward(model, x) for x in ids], "plain PyTorch"
    task = description.task
    if description.head is None:
        results = [(hidden, hidden[-1]) for hidden, _ in results]
    elif task is not None and task.info.per_residue and not task.info.per_pair:
        # The outputs of other programs are of all tokens, ours without <cls> and <eos>.
        results = [(hidden, outputs[1:-1]) for hidden, outputs in results]
    return results, method


@contextmanager
def _ran_by(package: str, path: Path) -> Iterator[None]:
    """Turn whatever another program raises into one line: it checks more of a file than we read."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{path}: {package}, which verifies this format, does not run it ({reason}); the conversion "
            "itself ended well: leave out --verify, or mend the file"
        ) from error


def _is_as_transformers_writes(path: Path) -> bool:
    """Tell whether transformers finds all tensors: in a directory, under the names that it wrote."""
    return path.is_dir() and not without_shared_prefix(open_tensors(path))[1]


def _installed(package: str) -> str | None:
    """Return the name and version of an installed package, else None."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


@torch.no_grad()
def _esm2mega(
    checkpoint: Path, prepare: Prepare, ids: list[Tensor], description: Description, precision: str
) -> list[Result]:
    from esm2mega.checkpoint import layout
    from esm2mega.checkpoint.store import load_weights
    from esm2mega.checkpoint.tensor_filter import ALL, ENCODER
    from esm2mega.config.schema import ParallelConfig
    from esm2mega.model.build import build_model
    from esm2mega.model.heads import head_of_task
    from esm2mega.model.hidden_states import hidden_states
    from esm2mega.model.packed import PackedSequences
    from esm2mega.parallel.initialize import process_groups

    config = layout.read_config(checkpoint).model
    config.precision, config.layer_spec = precision, "local"
    task = description.task
    make_head = None if task is None else head_of_task(task.task, task.info.num_outputs)
    results = []
    with process_groups(ParallelConfig(), seed=1) as ranks:
        (model,) = build_model(config, ParallelConfig(), ranks.device, 1, make_head)
        load_weights(checkpoint, [model], ENCODER if description.head is None else ALL)
        if task is not None:
            _scale_outputs(model, task.info, prepare)
        _round(model, prepare)
        model.eval()
        layers = range(model.config.num_layers + 1)
        with hidden_states(model, layers) as found:
            for x in ids:
                packed = PackedSequences.from_lengths([len(x)], ranks.device)
                segments = () if task is None else (Segments.of_protein(x).to(ranks.device),)
                outputs = model(x.to(ranks.device), packed, *segments)
                if description.head == "lm" and config.family != "esm2":
                    outputs = outputs[:, sorted(esm_ids(TAPE_TOKENS))]
                elif description.head is None:
                    outputs = found[layers[-1]]
                states = [found[number].detach().cpu() for number in layers]
                results.append((states, outputs.detach().cpu()))
    return results


def _scale_outputs(model: Any, info: TargetInfo, prepare: Prepare) -> None:
    """Scale outputs to units of the labels in the last layer, with the rounding of other formats.

    Heads without such a layer have no equal in other formats, and are compared as they are.
    """
    last = getattr(model.head, "output", None)
    is_normed = hasattr(last, "weight_g")
    if not info.std or last is None or (is_normed and len(info.std) > 1):
        return
    std, mean = (torch.tensor(x, dtype=torch.float64) for x in (info.std, info.mean))
    if is_normed:
        last.weight_g.copy_(prepare(last.weight_g.double() * std))
    else:
        last.weight.copy_(prepare(last.weight.double() * std[:, None]))
    last.bias.copy_(prepare(last.bias.double() * std + mean))


def _round(model: torch.nn.Module, prepare: Prepare) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(prepare(parameter.data))


@torch.no_grad()
def _transformers(path: Path, prepare: Prepare, ids: list[Tensor], description: Description) -> list[Result]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = "EsmForMaskedLM" if description.head == "lm" else "EsmModel"
    if description.task is not None:
        name = architecture_of(description.task)
    model = getattr(transformers, name).from_pretrained(path, local_files_only=True, dtype=torch.float32)
    _round(model, prepare)
    model.eval()
    results = []
    for x in ids:
        outputs = model(x[None], attention_mask=torch.ones_like(x)[None], output_hidden_states=True)
        hidden = [h[0] for h in outputs.hidden_states]
        if description.head is None:
            results.append((hidden, hidden[-1]))
        else:
            per_protein = description.task is not None and not description.task.info.per_residue
            results.append((hidden, outputs.logits if per_protein else outputs.logits[0]))
    return results


@torch.no_grad()
def _fair_esm(path: Path, prepare: Prepare, ids: list[Tensor]) -> list[Result]:
    from argparse import Namespace

    import esm

    # fair-esm's own loader is not used, since it unpickles without an allow-list.
    from esm2mega.convert.files import pickles
    from esm2mega.convert.formats.fair_esm import contact_file

    data = pickles.load_pickle(path, [Namespace])
    contact = pickles.load_pickle(contact_file(path)) if contact_file(path).is_file() else None
    load: Callable[..., Any] = esm.pretrained.load_model_and_alphabet_core
    model, _ = load(path.stem if path.stem.startswith("esm2") else f"esm2_{path.stem}", data, contact)
    model = model.float().eval()
    _round(model, prepare)
    layers = list(range(model.num_layers + 1))
    results = []
    for x in ids:
        outputs = model(x[None], repr_layers=layers)
        results.append(([outputs["representations"][n][0] for n in layers], outputs["logits"][0]))
    return results
