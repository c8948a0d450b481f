"""Downstream tasks at layouts: the results are those of one process, and every rank goes on training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esm2mega.autoeval.downstream.measure import Downstream
from esm2mega.config.load import load_run
from esm2mega.train.pretrain import pretrain
from tests.distributed.runs import SETTINGS, records
from tests.ranks import run_ranks
from tests.unit.autoeval.downstream.test_measure import write_tasks

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install esm2mega[finetune]")
pytestmark = pytest.mark.distributed


def _measured(folder: Path, store: Path, world_size: int, *layout: str) -> list[dict[str, Any]]:
    tasks = [folder.parent / "tasks" / name for name in ("size", "helix")]
    if not tasks[0].exists():
        write_tasks(tasks[0].parent)
    names = ",".join(map(str, tasks))
    words = [f"run_dir={folder}", f"data.train={store}", f"data.valid={store.parent / 'valid'}", *SETTINGS]
    words += [
        "model.precision=fp64",
        "train.eval_every=2",
        "train.max_steps=2",
        f"downstream.tasks=[{names}]",
    ]
    words += ["checkpoint.best_metric=downstream/size", *layout]
    if world_size == 1:
        run = load_run(None, words)
        pretrain(run, downstream=Downstream(run))
    else:
        run_ranks(["-m", "esm2mega", "pretrain", *words], world_size, folder / "output")
    return [record for record in records(folder) if record["kind"] == "downstream"]


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")),
        pytest.param(
            4,
            (
                "parallel.tensor_model_parallel_size=2",
                "parallel.sequence_parallel=true",
                "parallel.distributed_optimizer=true",
                "model.recompute=full",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            (
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(4, ("parallel.pipeline_model_parallel_size=2",), marks=pytest.mark.slow),
    ],
)
def test_results_are_those_of_one_process(
    store: Path, tmp_path: Path, world_size: int, layout: tuple[str, ...]
) -> None:
    """In fp64 another layout adds in another order, far from any step of a rank or a class."""
    (expected,) = _measured(tmp_path / "one", store, 1)
    (found,) = _measured(tmp_path / "many", store, world_size, *layout)
    assert found.keys() == expected.keys() and len(found) == 6
    for name, value in expected.items():
        assert found[name] == (value if name == "kind" else pytest.approx(value, abs=1e-9)), name
