"""What is saved comes back, what does not fit is refused, and a full disk leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from esm2mega.checkpoint import layout, store
from esm2mega.checkpoint.saver import Saver
from esm2mega.checkpoint.store import load_training_state, load_weights
from esm2mega.errors import MachineError, UserError
from esm2mega.train.step import TrainState, train_step
from tests.ranks import RankResult, run_ranks, start_ranks, wait_ranks
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS, packed_batch, tiny_run, train_state

BATCHES = [packed_batch([[0, 5, 32, 7, 32, 2]], {1: 5, 2: 9, 3: 4, 4: 23})]
SHARDED = "parallel.distributed_optimizer=true"


def _weights(state: TrainState) -> dict[str, Tensor]:
    return {
        name: value.clone() for name, value in state.model[0].module.state_dict().items() if value is not None
    }


def _optimizer(state: TrainState) -> list[tuple[str, Any]]:
    """Moments and step counts in the order of the parameters, and the settings of the groups."""
    parts = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    found: list[tuple[str, Any]] = []
    for part in parts:
        for group in part.optimizer.param_groups:
            # Loading puts the step count into the groups of the sharded optimizer too; Adam ignores it there.
            settings = {key: value for key, value in group.items() if key not in ("params", "step")}
            found += sorted(settings.items())
            for parameter in group["params"]:
                found.append(("main", parameter.detach().clone()))
                found += sorted(
                    (key, value.clone()) for key, value in part.optimizer.state[parameter].items()
                )
    return found


def _same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(first == second)


def _stepped(*overrides: str, steps: int = 2) -> TrainState:
    state = train_state(tiny_run(*overrides))
    with torch.no_grad():
        # As loaded frequencies of published weights would be.
        state.model[0].module.rotary.inv_freq.mul_(1.25)
    for _ in range(steps):
        train_step(state, BATCHES)
    return state


def _loss_scale(state: TrainState) -> dict[str, Any]:
    """What decides the loss scale from here on; nothing in other precisions than fp16."""
    (part,) = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    scaler = getattr(part, "grad_scaler", None)
    return {} if scaler is None else {k: float(value) for k, value in scaler.state_dict().items()}


def _save(state: TrainState, directory: Path, *overrides: str) -> Path:
    Saver().save(
        directory, state.model, state.optimizer, tiny_run(*overrides), {"step": 2, "valid_loss": None}
    )
    return directory


@pytest.mark.some(4)
@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (2, ("model.precision=fp64",)),
        (2, ("model.precision=bf16",)),
        (2, ("model.precision=fp32", SHARDED)),
        (2, ("model.precision=bf16", SHARDED)),
        (2, ("model.precision=fp64", SHARDED)),
        (0, ("model.precision=fp64",)),
        (0, ("model.precision=fp32", SHARDED)),
        # The first steps are skipped, for gradients that overflow.
        (2, ("model.precision=fp16", "optim.initial_loss_scale=65536")),
        (2, ("model.precision=fp16", "optim.initial_loss_scale=65536", SHARDED)),
    ],
    ids=str,
)
def test_training_state_comes_back(tmp_path: Path, steps: int, settings: tuple[str, ...]) -> None:
    """Also that of a training whose weights were never updated, which all of its steps may have skipped."""
    from esm2mega.parallel.initialize import process_groups

    with process_groups(tiny_run(*settings).parallel, seed=1):
        saved = _stepped(*settings, steps=steps)
        checkpoint = _save(saved, tmp_path / "step_00000002", *settings)
        fresh = train_state(tiny_run("seed=77", *settings))
        assert not torch.equal(
            _weights(fresh)["lm_head.dense.weight"], _weights(saved)["lm_head.dense.weight"]
        )
        load_training_state(checkpoint, fresh.model, fresh.optimizer)
        expected, actual = _weights(saved), _weights(fresh)
        assert actual.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
        moments, loaded = _optimizer(saved), _optimizer(fresh)
        assert [key for key, _ in loaded] == [key for key, _ in moments]
        assert [key for (key, a), (_, b) in zip(loaded, moments, strict=True) if not _same(a, b)] == []
        assert {"exp_avg", "exp_avg_sq", "step", "lr", "main"} <= {key for key, _ in moments}
        assert _loss_scale(fresh) == _loss_scale(saved)
        # The proof that nothing is missing: both go on alike.
        for state in (saved, fresh):
            train_step(state, BATCHES)
        assert all(
            torch.equal(a, b) for a, b in zip(_weights(saved).values(), _weights(fresh).values(), strict=True)
        )


def _by_name(state: TrainState) -> dict[str, Tensor]:
    """Main weights, moments and step counts under the names of the parameters, split or not."""
    (part,) = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    found = {}
    for name, parameter in state.model[0].module.named_parameters():
        # One process: its share of a split parameter is the whole one.
        if hasattr(part, "model_param_group_index_map"):
            group, index = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][index]
        else:
            main = getattr(parameter, "main_param", parameter)
        found[f"{name} main"] = main.detach().flatten().clone()
        found |= {f"{name} {key}": value.flatten() for key, value in part.optimizer.state[main].items()}
    return found


@pytest.mark.some(3)
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("before", "after"), [("false", "true"), ("true", "false")])
def test_distributed_optimizer_can_be_switched(
    tmp_path: Path, precision: str, before: str, after: str
) -> None:
    from esm2mega.parallel.initialize import process_groups

    first, second = (
        (f"model.precision={precision}", f"parallel.distributed_optimizer={value}")
        for value in (before, after)
    )
    with process_groups(tiny_run(SHARDED).parallel, seed=1):
        saved = _stepped(*first)
        checkpoint = _save(saved, tmp_path / "step_00000002", *first)
        fresh = train_state(tiny_run("seed=77", *second))
        load_training_state(checkpoint, fresh.model, fresh.optimizer)
        expected, actual = _by_name(saved), _by_name(fresh)
        assert actual.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
        assert any(name.endswith("exp_avg_sq") for name in expected)
        assert _loss_scale(fresh) == _loss_scale(saved)
        assert bool(_loss_scale(saved)) == (precision == "fp16")
        for state in (saved, fresh):
            train_step(state, BATCHES)
        assert all(
            torch.equal(a, b) for a, b in zip(_weights(saved).values(), _weights(fresh).values(), strict=True)
        )


def test_weights_alone_come_back(world: None, tmp_path: Path) -> None:
    saved = _stepped()
    checkpoint = _save(saved, tmp_path / "step_00000002")
    fresh = train_state(tiny_run("seed=77"))
    load_weights(checkpoint, fresh.model)
    expected, actual = _weights(saved), _weights(fresh)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
    assert not any("exp_avg" in key for key, _ in _optimizer(fresh))


def test_directory_holds_what_a_reader_needs(world: None, tmp_path: Path) -> None:
    checkpoint = _save(_stepped(), tmp_path / "checkpoints" / "step_00000002")
    assert {path.name for path in checkpoint.iterdir()} == {
        "COMPLETE",
        "config.yaml",
        "digests.json",
        "model",
        "train_state.json",
    }
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step_00000002"]
    assert layout.read_config(checkpoint) == tiny_run()


def test_saving_again_replaces_remains_of_a_crash(world: None, tmp_path: Path) -> None:
    remains = tmp_path / "step_00000002.partial" / "model"
    remains.mkdir(parents=True)
    (remains / "__9_9.distcp").write_text("")
    checkpoint = _save(_stepped(), tmp_path / "step_00000002")
    assert not (checkpoint / "model" / "__9_9.distcp").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_saving_leaves_no_process_behind(world: None, tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    _save(_stepped(), tmp_path / "step_00000002")
    assert set(psutil.Process().children()) <= before


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Renames the model's tensors in what is saved or asked for: fill in old -> new."""
    names: dict[str, str] = {}
    original = store.sharded_state

    def renamed(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        state = original(*arguments, **keywords)
        for tensor in state["model0"].values():
            tensor.key = names.get(tensor.key, tensor.key)
        return state

    monkeypatch.setattr(store, "sharded_state", renamed)
    return names


def test_tensors_of_another_model_are_refused(world: None, tmp_path: Path, tampered: dict[str, str]) -> None:
    state = _stepped()
    checkpoint = _save(state, tmp_path / "step_00000002")
    tampered["lm_head.dense.bias"] = "lm_head.other.bias"
    with pytest.raises(UserError) as error:
        load_weights(checkpoint, state.model)
    assert "missing lm_head.other.bias, unexpected lm_head.dense.bias" in str(error.value)
    with pytest.raises(UserError, match="cannot be loaded into this model") as error:
        load_training_state(checkpoint, state.model, state.optimizer)
    assert "\n" not in str(error.value)


def test_missing_optimizer_is_refused_when_training_goes_on(world: None, tmp_path: Path) -> None:
    """A checkpoint of weights alone cannot be resumed, only started from."""
    from megatron.core import dist_checkpointing

    state = _stepped()
    checkpoint = tmp_path / "step_00000002"
    (checkpoint / "model").mkdir(parents=True)
    weights = store.sharded_state(state.model, None, is_loading=False)
    dist_checkpointing.save(weights, str(checkpoint / "model"))
    load_weights(checkpoint, state.model)
    with pytest.raises(UserError, match="cannot be loaded into this model"):
        load_training_state(checkpoint, state.model, state.optimizer)


@pytest.mark.parametrize("change", ["model.num_layers=3", "model.ffn_hidden_size=64"])
def test_another_shape_is_refused(world: None, finished: TinyRun, change: str) -> None:
    other = train_state(tiny_run(change))
    checkpoint = layout.step_dir(finished.run_dir, 4)
    for load in (
        lambda: load_weights(checkpoint, other.model),
        lambda: load_training_state(checkpoint, other.model, other.optimizer),
    ):
        with pytest.raises(UserError) as error:
            load()
        assert str(checkpoint) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["garbage", "absent"])
@pytest.mark.parametrize("file", [".metadata", "metadata.json", "common.pt", "__0_0.distcp"])
def test_damaged_files_are_refused(
    world: None, finished: TinyRun, tmp_path: Path, file: str, damage: str
) -> None:
    checkpoint = tmp_path / "step_00000004"
    shutil.copytree(layout.step_dir(finished.run_dir, 4), checkpoint)
    path = checkpoint / "model" / file
    if file == "common.pt" and not path.exists():
        pytest.skip("megatron-core from 0.19 on writes no common.pt")
    assert path.is_file()
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(b"garbage" * 10)
    state = train_state(tiny_run())
    with pytest.raises(UserError) as error:
        load_training_state(checkpoint, state.model, state.optimizer)
    assert str(checkpoint) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not hold root back")
def test_unwritable_directory_is_a_machine_error(world: None, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MachineError, match="Permission denied"):
        _save(_stepped(), tmp_path / "checkpoints" / "step_00000002")


def test_path_below_a_file_is_a_machine_error(world: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        MachineError, match="not saved: Not a directory; free space or choose another run_dir"
    ):
        _save(_stepped(), tmp_path / "file" / "step_00000002")


# The command line with a limit on the size of a file: beyond it writing fails, as it does on a full disk.
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from esm2mega.cli.app import main
sys.exit(main(sys.argv[1:]))
"""


def _pretrain(finished: TinyRun, run_dir: Path) -> list[str]:
    return ["pretrain", f"run_dir={run_dir}", f"data.train={finished.train}", *SETTINGS]


def _assert_clean_failure(results: list[RankResult], run_dir: Path, reason: str, step: int = 4) -> None:
    assert [result.returncode for result in results] == [1] * len(results)
    lines = [line for result in results for line in result.stderr.splitlines()]
    errors = [line for line in lines if line.startswith("esm2mega: ") and "error: " in line]
    assert len(errors) == 1, "\n".join(lines)
    assert re.search(rf"step_{step:08d}: not saved: ({reason})", errors[0]), errors[0]
    assert "Traceback" not in "\n".join(lines)
    assert not any("encountered an error" in line for line in lines), "Megatron-Core's account of the same"
    assert list((run_dir / "checkpoints").iterdir()) == []


@pytest.mark.some(1)
@pytest.mark.parametrize("step", [4, 2])
def test_full_disk_while_saving(finished: TinyRun, tmp_path: Path, step: int) -> None:
    """Both ranks end, and one of them tells why: at the end of the run, and in the background before it."""
    run_dir = tmp_path / "run"
    in_background = [] if step == 4 else ["checkpoint.async_save=true", "checkpoint.save_every=2"]
    arguments = ["-c", LIMITED, *_pretrain(finished, run_dir), *in_background]
    processes = start_ranks(arguments, 2, tmp_path / "output")
    results = wait_ranks(processes, tmp_path / "output", timeout=120)
    # The limit strikes in a writer of bytes, or inside PyTorch's writer of tensors, which words it otherwise.
    _assert_clean_failure(results, run_dir, "File too large|a file could not be written whole", step)


# The command line on a disk that is full when rank 0 writes one of Megatron-Core's files alone: the first, on
# the way to a collective, or one of the last.
FULL_FOR_SMALL_FILES = """
import errno, sys
from megatron.core.dist_checkpointing import serialization
from torch.distributed.checkpoint import FileSystemWriter
def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")
if sys.argv[1] == "index":
    FileSystemWriter.finish = full
elif sys.argv[1] == "common":
    import os, resource
    from esm2mega.checkpoint.saver import Saver
    save = Saver.save
    def limited(*arguments, **options):
        if os.environ["RANK"] == "0":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        save(*arguments, **options)
    Saver.save = limited
else:
    serialization.save_config = full
from esm2mega.cli.app import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.some(1)
@pytest.mark.parametrize("file", ["common", "index", "config"])
def test_full_disk_for_a_file_of_rank_0_alone(finished: TinyRun, tmp_path: Path, file: str) -> None:
    """The other rank, which waits in a collective behind it, is told."""
    run_dir = tmp_path / "run"
    arguments = ["-c", FULL_FOR_SMALL_FILES, file, *_pretrain(finished, run_dir)]
    processes = start_ranks(arguments, 2, tmp_path / "output")
    results = wait_ranks(processes, tmp_path / "output", timeout=60)
    reason = "File too large" if file == "common" else "No space left on device"
    _assert_clean_failure(results, run_dir, rf"{reason} \(rank 0\); free space")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="mount is not installed")
def test_really_full_disk_while_saving(finished: TinyRun, tmp_path: Path, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    processes = start_ranks(["-m", "esm2mega", *_pretrain(finished, run_dir)], 1, tmp_path / "output")
    _assert_clean_failure(
        wait_ranks(processes, tmp_path / "output", timeout=120),
        run_dir,
        "(No space left on device|a file .* whole)",
    )


@pytest.mark.slow
def test_resume_and_inspect_show_no_warnings_of_libraries(finished: TinyRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    shutil.rmtree(layout.step_dir(run_dir, 4))
    commands = (_pretrain(finished, run_dir), ["inspect", str(run_dir)])
    code = f"from esm2mega.cli.app import main; raise SystemExit(max(map(main, {commands!r})))"
    shown = ["-Wdefault::FutureWarning", "-Wdefault::UserWarning"]
    (result,) = run_ranks([*shown, "-c", code], 1, tmp_path / "output")
    assert "resumed from step_00000002" in result.stderr and "weights sha256" in result.stdout
    assert "Warning" not in result.stderr
