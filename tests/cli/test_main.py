"""The console: help without torch, one line and a fixed exit code per error, one rank that speaks."""

import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

from esm2mega.cli.app import cli, main
from esm2mega.errors import MachineError, StoppedBySignal, UserError

COMMANDS = [
    *("quickstart", "translate", "prepare", "plan", "pretrain", "finetune", "predict", "evaluate", "compare"),
    *("convert", "export", "embed", "map", "probe", "autoeval", "score", "lora"),
    *("inspect", "prove", "drill", "plot", "watch", "benchmark", "doctor"),
]
HEAVY = ("torch", "numpy", "omegaconf", "megatron", "rich", "matplotlib")


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def doctor_does(monkeypatch):
    """Let `esm2mega doctor` raise an error or return a report, in place of checking this machine."""

    def install(outcome: BaseException | tuple[bool, str]) -> None:
        def doctor(path: str, quick: bool) -> tuple[bool, str]:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = types.ModuleType("esm2mega.doctor.run")
        module.doctor = doctor
        monkeypatch.setitem(sys.modules, "esm2mega.doctor.run", module)

    return install


def test_help_lists_the_commands_in_the_order_of_the_work(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:")[2].splitlines()
    assert [line.split()[0] for line in listed if line[:3].strip()] == COMMANDS
    assert list(cli.commands) == COMMANDS


@pytest.mark.parametrize(
    "command",
    [
        ["prepare", "fasta", "absent", "--out", "there"],
        ["prepare", "flip", "gb1", "--source", "absent", "--out", "there"],
        ["prepare", "tape", "stability", "--source", "absent", "--out", "there"],
        ["prepare", "deeploc2", "--source", "absent", "--out", "there"],
        ["prepare", "uniref", "--uf50", "absent", "--uf90", "b", "--mapping", "c", "--out", "there"],
        ["convert", "absent", "there", "--to", "hf"],
        ["lora", "merge", "absent", "--out", "there"],
        ["lora", "export", "absent", "--out", "there"],
        ["lora", "import", "absent", "--base", "absent", "--out", "there"],
        ["translate", "absent", "--out", "there"],
        ["benchmark", "absent", "--out", "there"],
    ],
    ids=lambda command: "-".join(command[:2]),
)
def test_an_output_that_exists_is_found_before_any_input_is_read(command, tmp_path, monkeypatch, capsys):
    """There is no input."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert main(command) == 2
    assert "there: exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        *([name] for name in COMMANDS),
        ["prepare", "fasta"],
        ["prepare", "uniref"],
        ["lora", "merge"],
        ["lora", "import"],
    ],
)
def test_every_command_has_help(command, capsys):
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: esm2mega {' '.join(command)}")
    assert "--verbose" in out


@pytest.mark.parametrize("arguments", [[], ["prepare"]])
def test_alone_a_group_shows_its_help(arguments, capsys):
    assert main(arguments) == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["pretrain", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from esm2mega.cli.app import main; code = main(sys.argv[1:]); "
        f"sys.exit(code or ' '.join(m for m in {HEAVY} if m in sys.modules) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_quick():
    # Processor time, the least of three: on a busy machine the clock on the wall measures the others.
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "esm2mega", "--help"], check=True, capture_output=True, timeout=60
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretran"], "No such command 'pretran'"),
        (["prepare", "fastq"], "No such command 'fastq'"),
        (["pretrain", "--lr", "3"], "No such option"),
        (["plot"], "Missing argument 'RUN_DIR…'. (see `esm2mega plot --help`)"),
        (["prepare", "fasta", "x.fasta"], "Missing option '--out'"),
        (["prepare", "fasta", "--out", "x"], "Missing argument 'INPUT…'"),
        (["prepare", "uniref", "--uf50", "x"], "Missing option '--out'"),
        (["prepare", "uniref", "--out", "x"], "--uf50 and --uf90 and --mapping missing; give"),
        (["prepare", "uniref", "--out", "x", "--uf90", "x", "--table", "y"], "--uf90 and --table belong to"),
        (
            ["prepare", "uniref", "--out", "x", "--val-size", "3", "--table", "y"],
            "--val-size and --table",
        ),
        (["evaluate", "x", "--data", "y", "--max-batches", "0"], "Invalid value for '--max-batches'"),
        (["pretrain", "--config", "pretrain_8M"], "did you mean pretrain_esm2_8M?"),
        (["pretrain", "--config", "pretrain_esm2_8M", "train.lr=1"], "the nearest valid key is optim.lr"),
        (["pretrain", "--config", "pretrain_esm2_8M"], "data.train is not set"),
        (
            ["pretrain", "--config", "pretrain_esm2_650M", "parallel.pipeline_model_parallel_size=34"],
            "model.num_layers=33 is smaller than parallel.pipeline_model_parallel_size=34",
        ),
        (["prove", "--layouts", "ci", "--tp", "2"], "--layouts ci and --tp exclude each other"),
        (["prove", "--sp"], "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1"),
        (["prove", "--packed", "5"], "Invalid value for '--packed'"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, expected, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.startswith("esm2mega: error: ") and err.count("\n") == 1


def test_configuration_errors_come_before_torch():
    code = (
        "import sys; from esm2mega.cli.app import main; "
        "code = main(['pretrain', '--config', 'pretrain_esm2_8M']); "
        "sys.exit(code if 'torch' not in sys.modules else 'torch was imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr


def test_world_size_of_torchrun_is_checked(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert main(["pretrain", "--config", "pretrain_esm2_tiny", "parallel.tensor_model_parallel_size=2"]) == 2
    assert "[rank 0] error: world size 3 is not a multiple of" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert main(["pretrain", "--config", "pretrain_esm2_tiny"]) == 2
    assert "WORLD_SIZE=many is not a number of processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x.yaml:3: bad"), 2, "error: x.yaml:3: bad"),
        (MachineError("disk full"), 1, "error: disk full"),
        (StoppedBySignal("SIGTERM", " after step 7"), 75, "stopped by SIGTERM after step 7"),
        (OSError(28, "No space left on device", "a/b"), 1, "error: No space left on device: a/b"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (
            ValueError("first\nsecond"),
            1,
            "internal error: ValueError: first second (run with -v for the traceback)",
        ),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(doctor_does, capsys, error, code, line):
    doctor_does(error)
    assert main(["doctor"]) == code
    # click ends the line of an interrupted command first.
    assert capsys.readouterr().err.lstrip("\n") == f"esm2mega: {line}\n"


@pytest.mark.parametrize("arguments", [["-v", "doctor"], ["doctor", "-v"], ["--verbose", "doctor"]])
def test_verbose_shows_the_traceback_before_the_line(doctor_does, capsys, arguments):
    doctor_does(UserError("bad"))
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("\nesm2mega: error: bad\n")


def test_verbose_holds_for_argument_errors_too(capsys):
    assert main(["prepare", "fasta", "x", "--out", "y", "--val-size", "z", "-v"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("works", "code"), [(True, 0), (False, 1)])
def test_doctor_prints_its_report_and_fails_with_the_machine(doctor_does, capsys, works, code):
    doctor_does((works, "the report"))
    assert main(["doctor"]) == code
    assert capsys.readouterr().out == "the report\n"


@pytest.mark.parametrize(
    ("error", "rank", "is_main"),
    [
        # All ranks read the same configuration, so one is enough; a fault may be that of one rank alone.
        (UserError("bad"), "0", True),
        (UserError("bad"), "1", False),
        (MachineError("bad"), "1", True),
        (ValueError("bad"), "1", True),
    ],
)
def test_who_speaks_before_the_processes_know_each_other(monkeypatch, capsys, error, rank, is_main):
    def load_run(*_):
        raise error

    monkeypatch.setattr("esm2mega.config.load.load_run", load_run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert main(["pretrain"]) == getattr(error, "exit_code", 1)
    err = capsys.readouterr().err
    assert err.startswith(f"esm2mega: [rank {rank}] ") if is_main else err == ""


@pytest.mark.parametrize("claimed", [True, False])
def test_with_a_process_group_the_first_to_claim_speaks(monkeypatch, capsys, claimed):
    def load_run(*_):
        raise UserError("bad")

    distributed = types.SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True)
    monkeypatch.setattr("esm2mega.config.load.load_run", load_run)
    monkeypatch.setitem(sys.modules, "torch.distributed", distributed)
    errors = types.ModuleType("esm2mega.parallel.errors")
    errors.claim_error_report = lambda: claimed
    monkeypatch.setitem(sys.modules, "esm2mega.parallel.errors", errors)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert main(["pretrain"]) == 2
    assert capsys.readouterr().err == ("esm2mega: [rank 3] error: bad\n" if claimed else "")


@pytest.mark.parametrize("claimed", [True, False])
def test_an_answer_from_before_the_group_went_down_counts(monkeypatch, capsys, claimed):
    error = UserError("bad")
    error.claimed_report = claimed

    def load_run(*_):
        raise error

    monkeypatch.setattr("esm2mega.config.load.load_run", load_run)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert main(["pretrain"]) == 2
    assert capsys.readouterr().err == ("esm2mega: [rank 3] error: bad\n" if claimed else "")


def test_one_process_does_what_one_process_can(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["plot", "absent"]) == 0
    assert capsys.readouterr().out == ""


def test_prepare_fasta_splits_and_reports(tmp_path, capsys):
    fasta = tmp_path / "proteins.fasta"
    fasta.write_text("".join(f">p{i}\nMKVLA{'ACDEFGHIKL'[i]}\n" for i in range(10)))
    arguments = ["prepare", "fasta", str(fasta), "--out", str(tmp_path / "store"), "--val-size", "2"]
    assert main([*arguments, "--test-size", "1"]) == 0
    out = capsys.readouterr().out
    assert [line.partition(",")[0].rsplit("/", 1)[1] for line in out.splitlines()] == [
        "train: 7 sequences",
        "valid: 2 sequences",
        "test: 1 sequences",
    ]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "exists already" in said and said.count("\n") == 1, "no progress before the error"


def test_prepare_uniref_reports(tmp_path, capsys):
    texts = {
        "uf50": "".join(f">c{i}\nMKVLA{'ACDE'[i]}\n" for i in range(4)),
        "uf90": "".join(f">m{i}\nMKVLA{'ACDE'[i % 4]}\n" for i in range(8)),
        "mapping": "header\n" + "".join(f"c{i}\tm{i}; m{i + 4}\n" for i in range(4)),
    }
    arguments = ["prepare", "uniref", "--out", str(tmp_path / "store"), "--val-size", "1"]
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        arguments += [f"--{name}", str(tmp_path / name)]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert [line.partition(",")[0].rsplit("/", 1)[1] for line in captured.out.splitlines()] == [
        "train: 6 sequences",
        "valid: 1 sequences",
        "train: 3 clusters of 2.00 members on average",
    ]
    total = sum((tmp_path / name).stat().st_size for name in texts) + len(texts["uf50"])
    assert f"prepare: byte {total:,} of {total:,} (100 %)" in captured.err
    assert main(["inspect", str(tmp_path / "store" / "train")]) == 0
    assert "3 clusters of 6 members" in capsys.readouterr().out


def test_prepare_uniref_from_bionemo_and_tables(tmp_path, capsys):
    import sqlite3

    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = {name: str(tmp_path / name) for name in ("c", "d.db", "v", "w.db", "t", "u")}
    parquet.write_table(pyarrow.table({"ur90_id": [["m1", "m2"]]}), files["c"])
    parquet.write_table(pyarrow.table({"ur50_id": ["x"]}), files["v"])
    for name, rows in (("d.db", [("m1", "MK"), ("m2", "MA")]), ("w.db", [("x", "MW")])):
        with sqlite3.connect(files[name]) as database:
            database.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
            database.executemany("INSERT INTO protein VALUES (?, ?)", rows)
        database.close()
    columns = ("ur50_id", "ur90_id", "sequence")
    for name, row in (("t", ("c", "m", "MK")), ("u", ("x", "y", "MW"))):
        cells = {key: [value] for key, value in zip(columns, row, strict=True)}
        parquet.write_table(pyarrow.table(cells), files[name])
    options = [
        ["--train-cluster-path", files["c"], "--train-database-path", files["d.db"]]
        + ["--valid-cluster-path", files["v"], "--valid-database-path", files["w.db"]],
        ["--table", files["t"], "--valid-table", files["u"]],
    ]
    for number, given in enumerate(options):
        assert main(["prepare", "uniref", "--out", str(tmp_path / f"out{number}"), *given]) == 0
        captured = capsys.readouterr()
        assert f"out{number}/valid: 1 sequences" in captured.out and "1 clusters of" in captured.out
        assert "(100 %)" in captured.err


def test_prepare_fasta_takes_tables_and_options(tmp_path, capsys):
    table = tmp_path / "proteins.txt"
    table.write_text("aa;name\nMKV;a\n;b\n")
    arguments = ["prepare", "fasta", str(table), "--out", str(tmp_path / "store"), "--format", "csv"]
    arguments += ["--sequence-column", "aa", "--id-column", "name", "--workers", "2", "--shard-size", "0.001"]
    assert main(arguments) == 2
    assert "proteins.txt:3: the sequence of 'b' is empty" in capsys.readouterr().err
    assert main([*arguments, "--drop-empty"]) == 0
    assert "1 sequences, 3 residues" in capsys.readouterr().out
    assert main([*arguments, "--workers", "0"]) == 2
    assert "--workers" in capsys.readouterr().err


def test_python_m_and_the_exit_code_of_the_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "esm2mega", "plot", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("esm2mega: error: ") and done.stderr.count("\n") == 1
