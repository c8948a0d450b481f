"""Says what a suite evaluates, and whether an earlier start in the same folder evaluated the same.

The same are models with the same weights and published files with the same content, wherever they lie.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from esm2mega.autoeval.assays import find_assays
from esm2mega.autoeval.eval_model import EvalModel, open_models
from esm2mega.autoeval.places import Places
from esm2mega.autoeval.task_data import find_source, source_files
from esm2mega.autoeval.tasks import ZERO_SHOT, EvalTask
from esm2mega.config.load import load_run_over
from esm2mega.config.schema import ModelConfig, Run
from esm2mega.config.task import PAIR_KIND
from esm2mega.errors import UserError
from esm2mega.files import OTHER_OUT, file_sha256, read_json, write_json
from esm2mega.infer.proteingym import read_reference
from esm2mega.infer.work import differing

_REQUEST = "request.json"
_NOT_NOTED = ("out", "source", "checkpoints")


@dataclass(frozen=True)
class SuiteRequest:
    """Says what is evaluated.

    Attributes:
        checkpoints: The models, as `esm2mega embed` takes them.
        tasks: The tasks.
        modes: The modes, each defined for every task.
        source: Folder of the published files.
        out: Folder of the results.
        limits: Most proteins of each split, besides those of a suite.
        seed: Seed of the first head, of the chosen proteins and of the resamples.
        seeds: Number of heads of each model.
        layers: Hidden states that a probe tries; empty for the last one.
        overrides: ``key=value`` for `esm2mega finetune`; those of the layout are for every mode.
    """

    checkpoints: Sequence[str]
    tasks: Sequence[EvalTask]
    modes: Sequence[str]
    source: str
    out: str
    limits: dict[str, int]
    seed: int = 1234
    seeds: int = 1
    layers: Sequence[str] = ()
    overrides: Sequence[str] = ()


def check_request(request: SuiteRequest) -> None:
    """Refuse keys that there are not, and files that are missing, before the work starts."""
    load_run_over(Run(model=ModelConfig(size="tiny")), request.overrides)
    for task in request.tasks:
        source = Path(request.source)
        _ = find_assays(source) if task.kind is None else find_source(task, source)


def begin(request: SuiteRequest, out: Path) -> tuple[list[EvalModel], Places]:
    """Open the models; an earlier start must have had the same request, the same weights and the same data.

    Returns:
        The models, under the names of the first start; and where everything lies now.

    Raises:
        UserError: The earlier start had others, or `out` holds other files.
    """
    has_contacts = any(task.kind == PAIR_KIND for task in request.tasks) and ZERO_SHOT in request.modes
    noted, models = out / _REQUEST, open_models(request.checkpoints, has_contacts)
    earlier = read_json(noted, OTHER_OUT) if noted.is_file() else None
    first = models if earlier is None else [EvalModel(**model) for model in earlier["models"]]
    if len(first) == len(models):
        pairs = zip(models, first, strict=True)
        models = [replace(now, name=then.name, checkpoint=then.checkpoint) for now, then in pairs]
    asked = {
        **{name: value for name, value in asdict(request).items() if name not in _NOT_NOTED},
        "tasks": [task.name for task in request.tasks],
        "task limits": [dict(task.limits) for task in request.tasks],
        "weights": {model.name: model.weights_sha256 for model in models},
    }
    files = {task.name: _files_of(task, Path(request.source)) for task in request.tasks}
    data = {name: [file_sha256(path) for path in paths] for name, paths in files.items()}
    if earlier is not None:
        if changed := differing(earlier.get("request", {}), json.loads(json.dumps(asked))):
            raise UserError(f"{out}: was begun with another request: {changed}; {OTHER_OUT}")
        for name, paths in files.items():
            _check_data(name, paths, data[name], earlier.get("data", {}).get(name, []), request)
    # A kill while the request is written leaves a part of it under a name that begins like this.
    elif out.is_dir() and any(not path.name.startswith(f".{_REQUEST}.") for path in out.iterdir()):
        raise UserError(f"{out}: holds other files, and no {_REQUEST}; {OTHER_OUT}")
    else:
        write_json(noted, {"request": asked, "models": [asdict(model) for model in models], "data": data})
    moved = {then.path: now.path for then, now in zip(first, models, strict=True)}
    return models, Places(out, moved)


def _files_of(task: EvalTask, source: Path) -> list[Path]:
    """Return the published files that decide the data of a task."""
    if task.kind is not None:
        return source_files(task, source)
    reference, folder = find_assays(source)
    return [reference, *(assay.table for assay in read_reference(str(reference), str(folder)))]


def _check_data(
    task: str, paths: Sequence[Path], now: Sequence[str], then: Sequence[str], request: SuiteRequest
) -> None:
    """Refuse published files whose content is not that of the first start."""
    if list(now) == list(then):
        return
    others = [path for path, checksum in zip(paths, now, strict=True) if checksum not in then]
    what = f"{others[0]} has other content" if others else f"it has {len(now)} files and had {len(then)}"
    raise UserError(
        f"--source {request.source}: has other data of {task} than {request.out} was begun with: {what}; "
        f"give those, or {OTHER_OUT}"
    )
