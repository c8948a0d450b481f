"""The quickstart overwrites nothing, shows the commands that it runs, and passes failures on."""

import json
import shlex
import sys

import pytest

from esm2mega.checkpoint.choice import Choice
from esm2mega.config.load import load_run
from esm2mega.config.validate import validate
from esm2mega.errors import MachineError, UserError
from esm2mega.quickstart import run as quickstart_module
from esm2mega.quickstart import simulate
from esm2mega.quickstart.run import PROCESSES, pretrain_overrides, quickstart, run_step


@pytest.fixture
def stubbed(monkeypatch):
    """Replaces the subprocesses by a record of their commands; `evaluate` leaves its file."""
    commands = []

    def run(name, command, say):
        commands.append(list(command))
        if name == "evaluate":
            out = command[command.index("--out") + 1]
            with open(out, "w") as handle:
                json.dump({"loss": 2.4, "unigram_loss": 2.9}, handle)

    monkeypatch.setattr(quickstart_module, "run_step", run)
    monkeypatch.setattr(
        quickstart_module,
        "choose_checkpoint",
        lambda run_dir: Choice(run_dir / "checkpoints" / "step_00000005"),
    )
    monkeypatch.setattr(quickstart_module, "FAMILIES", 3)
    monkeypatch.setattr(quickstart_module, "MEMBERS", 4)
    return commands


@pytest.mark.parametrize("make", [lambda out: (out / "mine").touch(), lambda out: (out.rmdir(), out.touch())])
def test_existing_files_are_refused_and_kept(make, tmp_path, stubbed):
    out = tmp_path / "out"
    out.mkdir()
    make(out)
    with pytest.raises(UserError, match=r"out is not an empty directory; quickstart overwrites nothing"):
        quickstart(out)
    assert not stubbed
    assert out.is_file() or [path.name for path in out.iterdir()] == ["mine"]


def test_steps_commands_and_summary(tmp_path, stubbed):
    lines = []
    result = quickstart(tmp_path, seed=7, steps=5, say=lines.append)
    assert [command[command.index("esm2mega") + 1] for command in stubbed] == [
        "prepare", "pretrain", "evaluate", "plot", "embed",
    ]  # fmt: skip
    assert sum(line.startswith("[") for line in lines) == 6
    assert result.gain == pytest.approx(0.5)
    text = "\n".join(lines)
    assert "0.500 nats below that baseline" in text
    assert f"{tmp_path}/run/report.html" in text
    assert "esm2mega prepare fasta my_proteins.fasta.gz --out my_store" in text


def test_every_shown_command_is_the_one_that_ran(tmp_path, stubbed):
    lines = []
    quickstart(tmp_path, steps=5, say=lines.append)
    shown = [shlex.split(line) for line in lines if line.startswith("      ") and "esm2mega " in line]
    assert len(shown) == len(stubbed) == 5
    for words, ran in zip(shown, stubbed, strict=True):
        start = words.index("esm2mega")
        assert words[start:] == ran[ran.index("esm2mega") :]
        assert ("torchrun" in words) == ("torch.distributed.run" in ran)
        if "torchrun" in words:
            assert (
                words[words.index("--standalone") : start]
                == ran[ran.index("--standalone") : ran.index("esm2mega")]
            )


def test_the_shown_simulation_makes_the_same_proteins(tmp_path, stubbed):
    lines = []
    quickstart(tmp_path / "a", seed=3, steps=5, say=lines.append)
    (words,) = [shlex.split(line) for line in lines if "esm2mega.quickstart.simulate" in line]
    arguments = [word.replace(str(tmp_path / "a"), str(tmp_path / "b")) for word in words[3:]]
    simulate.main(arguments)
    for name in ("families.fasta", "clusters/mapping.tsv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("steps", [1, 5, quickstart_module.STEPS])
def test_the_overrides_are_a_valid_run(steps, tmp_path):
    overrides = pretrain_overrides(tmp_path / "store", tmp_path / "run", 1234, steps)
    run = load_run("pretrain_esm2_tiny", overrides)
    validate(run, PROCESSES)
    assert run.train.max_steps == steps
    assert run.parallel.tensor_model_parallel_size == 2


def test_output_of_a_step_is_passed_on(tmp_path):
    lines = []
    run_step(
        "prepare",
        [sys.executable, "-c", "import os; print('a'); print(os.environ['OMP_NUM_THREADS'])"],
        lines.append,
    )
    assert lines == ["      | a", "      | 1"]


@pytest.mark.parametrize(("code", "kind"), [(2, UserError), (1, MachineError), (9, MachineError)])
def test_a_failed_step_ends_with_what_the_command_said(code, kind):
    script = f"import sys; print('esm2mega: error: bad input'); print('launcher noise'); sys.exit({code})"
    with pytest.raises(UserError) as failure:
        run_step("prepare", [sys.executable, "-c", script], lambda line: None)
    assert type(failure.value) is kind
    assert str(failure.value) == f"prepare failed with exit code {code}: error: bad input"


def test_a_failure_without_a_message_of_ours_shows_the_last_lines():
    script = "print(*range(100), sep='\\n'); raise SystemExit(1)"
    with pytest.raises(MachineError) as failure:
        run_step("plot", [sys.executable, "-c", script], lambda line: None)
    assert str(failure.value).splitlines()[1:] == [str(number) for number in range(92, 100)]


def test_a_step_that_cannot_start():
    with pytest.raises(MachineError, match="plot could not start: No such file"):
        run_step("plot", ["/absent/interpreter"], lambda line: None)


def test_an_interrupt_ends_the_step(tmp_path):
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    pids = []

    def say(line):
        pids.append(int(line.split("|")[1]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_step("pretrain", [sys.executable, "-c", script], say)
    with pytest.raises(ProcessLookupError):
        quickstart_module.os.kill(pids[0], 0)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_for_real_it_learns_more_than_residue_frequencies(tmp_path):
    lines = []
    result = quickstart(tmp_path / "out", say=lines.append)
    assert result.gain >= 0.3, "\n".join(lines)
    assert result.plot.is_file() and result.checkpoint.is_dir() and result.embeddings.is_file()
