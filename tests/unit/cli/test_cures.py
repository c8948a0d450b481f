"""A cure that a message names exists in the command that prints it.

A message may name an option of the command at hand, ``--option``, a key of the configuration, ``key=value``,
where the command takes such, and another command whole, in backticks: `esm2mega convert SRC DST --drop X`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from esm2mega.checkpoint import layout
from esm2mega.checkpoint.choice import choose_checkpoint
from esm2mega.cli.app import cli, main
from esm2mega.config.load import known_keys
from esm2mega.finetune.api import train_model
from tests import foreign
from tests.checkpoints import put_state
from tests.flip_files import write_gb1
from tests.unit.conftest import TinyRun
from tests.unit.runs import SETTINGS

PACKAGE = Path(__file__).parents[3] / "esm2mega"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
KEY = re.compile(r"(?<![\w./-])((?:[a-z_]+\.)*[a-z_]+)=")
KEYS = set(known_keys())
ELSEWHERE = {
    *("--nproc-per-node", "--standalone"),  # of torchrun
    "--editable",  # of pip
    "--local-dir",  # of hf download
    *("--ipc", "--ulimit"),  # of docker run
    "--no-bias-gelu-fusion",  # of Megatron-LM
    # of MMseqs2
    *("--min-seq-id", "--cov-mode", "--alignment-mode", "--seq-id-mode", "--max-seqs", "--max-accept"),
    *("--split-memory-limit", "--dbtype", "--format-output"),
    "--help",
    "--long",  # of earlier versions, named in the refusal
}


def commands(group: click.Group = cli, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its name, groups flattened."""
    for word, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{name}{word} ")
        else:
            yield f"{name}{word}", command


COMMANDS = dict(commands())


def options_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def takes_keys(command: click.Command) -> bool:
    return any(parameter.name == "overrides" for parameter in command.params)


def wrong_cures(message: str, command: str) -> list[str]:
    """What a message of a command names that the command, or another one that it names, does not have."""
    wrong = []
    rest = message
    for quoted in re.findall(r"`esm2mega ([^`]*)`", message):
        rest = rest.replace(f"`esm2mega {quoted}`", "")
        named = next(
            (name for name in sorted(COMMANDS, key=len, reverse=True) if quoted.startswith(name)), None
        )
        wrong += [quoted] if named is None else wrong_cures(re.sub(r"`", "", quoted[len(named) :]), named)
    wrong += [option for option in OPTION.findall(rest) if option not in options_of(COMMANDS[command])]
    for key in KEY.findall(rest):
        is_key = key in KEYS
        if ("." in key or is_key) and not (is_key and takes_keys(COMMANDS[command])):
            wrong.append(key)
    return wrong


def test_the_check_itself() -> None:
    assert wrong_cures("x: bad; give --drop 'a' or --from hf", "convert") == []
    assert wrong_cures("x: bad; give --drop 'a' or --from hf", "embed") == ["--drop", "--from"]
    assert wrong_cures("x: bad; `esm2mega convert --drop 'a'` leaves it out", "embed") == []
    assert wrong_cures("x: bad; `esm2mega embed --drop 'a'` leaves it out", "convert") == ["--drop"]
    assert wrong_cures("set data.sequence_column=x", "evaluate") == []
    assert wrong_cures("set data.sequence_column=x", "convert") == ["data.sequence_column"]
    assert wrong_cures("set data.no_such=x", "evaluate") == ["data.no_such"]
    assert wrong_cures("say where it is with init_from=PATH", "lora merge") == ["init_from"]


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a module that are no documentation, with their lines."""
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


def test_every_option_and_key_in_the_package_exists() -> None:
    """In some command; which one is for the tests below."""
    options = {option for command in COMMANDS.values() for option in options_of(command)} | ELSEWHERE
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    found, wrong = 0, []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name in ("quickstart", "results") or path.name == "style.py":
            continue  # a program with options of its own; pages whose colours are variables of CSS
        for line, text in strings(path):
            named = OPTION.findall(text)
            keys = [key for key in KEY.findall(text) if key.partition(".")[0] in sections and "." in key]
            found += len(named) + len(keys)
            wrong += [f"{path.name}:{line}: {name}" for name in named if name not in options]
            wrong += [f"{path.name}:{line}: {key}=" for key in keys if key not in KEYS]
    assert not wrong
    assert found > 200, "the strings were looked at"


# Checkpoints that cannot be read.


def absent(folder: Path, _: TinyRun) -> Path:
    return folder / "nowhere"


def empty(folder: Path, _: TinyRun) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def text(folder: Path, _: TinyRun) -> Path:
    (folder / "notes.txt").write_text("nothing")
    return folder / "notes.txt"


def hugging_face(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = foreign.write_hf(foreign.truth(torch.float32), folder)
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors")
    return path


def a_tensor_too_many(folder: Path, _: TinyRun) -> Path:
    return hugging_face(folder, lambda state: state.update({"my_head.weight": torch.zeros(2)}))


def a_tensor_too_few(folder: Path, _: TinyRun) -> Path:
    return hugging_face(folder, lambda state: state.pop("lm_head.dense.bias"))


def an_untied_decoder(folder: Path, _: TinyRun) -> Path:
    decoder = torch.zeros(33, foreign.H)
    return hugging_face(folder, lambda state: state.update({"lm_head.decoder.weight": decoder}))


def integers(folder: Path, _: TinyRun) -> Path:
    return hugging_face(
        folder, lambda state: state.update({"lm_head.bias": torch.zeros(33, dtype=torch.int32)})
    )


def another_model(folder: Path, _: TinyRun) -> Path:
    path = hugging_face(folder, lambda state: None)
    (path / "config.json").write_text(
        json.dumps({**foreign.HF_CONFIG, "position_embedding_type": "absolute"})
    )
    return path


def no_config(folder: Path, _: TinyRun) -> Path:
    path = hugging_face(folder, lambda state: None)
    (path / "config.json").unlink()
    return path


def damaged(folder: Path, _: TinyRun) -> Path:
    path = hugging_face(folder, lambda state: None)
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60))
    return path


def state_dict_without_heads(folder: Path, _: TinyRun) -> Path:
    torch.save({"embed_tokens.weight": torch.zeros(33, 48)}, folder / "x.pt")
    return folder / "x.pt"


def a_whole_object(folder: Path, _: TinyRun) -> Path:
    torch.save({"model": torch.nn.Linear(1, 1)}, folder / "x.pt")
    return folder / "x.pt"


def incomplete(folder: Path, finished: TinyRun) -> Path:
    path = folder / "run" / "checkpoints" / "step_00000001"
    (path / "model").mkdir(parents=True)
    return path


def adapters_without_base(folder: Path, finished: TinyRun) -> Path:
    base = folder / "base"
    os.symlink(finished.run_dir, base)
    settings = [*SETTINGS, f"run_dir={folder / 'adapted'}", "train.max_steps=1", "task.kind=regression"]
    lora = ["finetune.mode=lora", "lora.rank=2", f"init_from={base}"]
    train_model([*settings, *lora], train=[("MKT", 1.0), ("LAGV", 4.0)])
    checkpoint = choose_checkpoint(folder / "adapted").path
    state = json.loads((checkpoint / layout.STATE).read_text())
    state["base"]["path"] = str(folder / "gone")
    config = checkpoint / layout.CONFIG
    config.write_text(config.read_text().replace(str(base), str(folder / "gone")))
    put_state(checkpoint, state)
    return folder / "adapted"


CHECKPOINTS = [
    *(absent, empty, text, a_tensor_too_many, a_tensor_too_few, an_untied_decoder, integers, another_model),
    *(no_config, damaged, state_dict_without_heads, a_whole_object, incomplete, adapters_without_base),
]


def readers_of_checkpoints(path: Path, folder: Path) -> dict[str, list[str]]:
    """Arguments of every command that reads a checkpoint."""
    out, fasta = str(folder / "out"), str(folder / "x.fasta")
    Path(fasta).write_text(">a y=1\nMKT\n>b y=2\nMKV\n")
    training = [f"init_from={path}", f"data.train={fasta}", f"run_dir={out}", "train.eval_every=0"]
    return {
        "convert": [str(path), out, "--to", "hf"],
        "export": [str(path), "--to", "torch", "--out", f"{out}.pt2"],
        "embed": [str(path), fasta, "--out", f"{out}.h5"],
        "score": [str(path), "--sequence", "MK", "--out", f"{out}.csv"],
        "inspect": [str(path)],
        "evaluate": [str(path), "--data", fasta],
        "compare": [str(path), str(path), "--data", fasta],
        "predict": [str(path), fasta, "--out", f"{out}.csv"],
        "pretrain": [*training, "model.size=tiny"],
        "finetune": [*training, "task.kind=regression", "task.target_columns=[y]", "train.max_steps=1"],
        "lora merge": [str(path), "--out", out],
        "lora export": [str(path), "--out", out],
    }


@pytest.mark.parametrize("make", CHECKPOINTS, ids=lambda make: make.__name__)
def test_cures_of_unreadable_checkpoints(
    make: Callable[[Path, TinyRun], Path],
    finished: TinyRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("esm", reason="fair-esm is not installed")
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path, finished)
    refused = 0
    for name, arguments in readers_of_checkpoints(path, tmp_path).items():
        capsys.readouterr()
        code = main([*name.split(), *arguments])
        line = capsys.readouterr().err.strip().rpartition("\n")[2]
        # `inspect` and `lora export` need no base, and a training no more than the weights of an encoder.
        if code == 0:
            continue
        assert code == 2 and line.startswith("esm2mega: error: "), (name, line)
        assert not wrong_cures(line, name), (name, line)
        refused += 1
    assert refused >= 6


def test_where_the_base_of_adapters_is_can_be_said(
    finished: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cure of a base that has moved is taken by the command that names it."""
    path = adapters_without_base(tmp_path, finished)
    fasta = tmp_path / "x.fasta"
    fasta.write_text(">a\nMKT\n")
    for name, arguments, cure in (
        (
            "embed",
            [str(path), str(fasta), "--out", str(tmp_path / "x.h5")],
            [f"init_from={finished.run_dir}"],
        ),
        (
            "predict",
            [str(path), str(fasta), "--out", str(tmp_path / "x.csv")],
            [f"init_from={finished.run_dir}"],
        ),
        ("lora merge", [str(path), "--out", str(tmp_path / "m")], ["--base", str(finished.run_dir)]),
    ):
        assert main([*name.split(), *arguments]) == 2
        shown = cure[0].partition("=")[0]
        assert f"is not there any more; say where it is with {shown}" in capsys.readouterr().err
        assert main([*name.split(), *arguments, *cure]) == 0, capsys.readouterr().err
    write_gb1(tmp_path / "gb1")
    suite = ["autoeval", str(path), "--tasks", "flip/gb1", "--source", str(tmp_path), "--out", "suite"]
    assert main(suite) == 2
    line = capsys.readouterr().err
    assert (
        "is not there any more; make a whole model of them with `esm2mega lora merge CHECKPOINT --ba" in line
    )
    assert not wrong_cures(line, "autoeval")


# Tables that cannot be read.

TASK = ("task.kind=regression", "task.target_columns=[y]")

TABLES = {
    "t.csv": "id,sequences,y\na,MKT,1\nb,MKV,2\n",
    "no_cell.csv": "id,sequence,y\na,MKT,1\n,MKV,2\n",
    "missing.csv": "id,sequence,y\na,MKT,1\nb,nan,2\n",
    "fasta.csv": ">a y=1\nMKT\n",
    "number.jsonl": '{"id": "a", "sequence": 5, "y": 1}\n',
    "long.csv": f"id,sequence,y\na,{'MKT' * 400},1\nb,MKV,2\n",
    "cells.csv": "id,sequence,y\na,MKT,1,7\n",
    "variants.csv": "mutant,y\nA24G,1\n",
    "comma.csv": "id;sequence;y\na;MKT;0,5\nb;MKV;1,234\n",
    "text.xlsx": "id,sequence,y\na,MKT,1\n",
    "page.fasta": "<html>\n",
}


@pytest.mark.some(5)
@pytest.mark.parametrize("name", TABLES)
def test_cures_of_unreadable_tables(
    name: str, finished: TinyRun, tmp_path: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / name, str(tmp_path / "out")
    table.write_text(TABLES[name])
    run = str(finished.run_dir)
    training = [*SETTINGS, "train.max_steps=1", "train.eval_every=0", f"run_dir={out}", f"data.train={table}"]
    structures = tmp_path / "structures"
    structures.mkdir()
    (structures / "a.fasta").write_text(">a\nMKT\n")
    (structures / ("a.fasta" if name.endswith(".fasta") else "a.csv")).write_text(TABLES[name])
    for command, arguments in {
        "prepare fasta": [str(table), "--out", out, "--workers", "1"],
        "embed": [run, str(table), "--out", f"{out}.h5"],
        "predict": [str(tuned), str(table), "--out", f"{out}.csv"],
        "pretrain": training,
        "finetune": [*training, *TASK],
        "evaluate": [str(tuned), "--data", str(table)],
        "compare": [str(tuned), str(tuned), "--data", str(table)],
        "score": [run, "--fasta", str(table), "--out", f"{out}.csv"],
        "prepare deeploc2": ["--source", str(table), "--out", out],
        "prepare contacts": ["--source", str(structures), "--out", out],
        "inspect": ["--leakage", str(table), str(table)],
    }.items():
        capsys.readouterr()
        code = main([*command.split(), *arguments])
        line = capsys.readouterr().err.strip().rpartition("\n")[2]
        if code == 0 and name in ("long.csv", "comma.csv"):
            continue  # long proteins are cropped there or taken as they are, and labels are not read
        assert code == 2 and line.startswith("esm2mega: error: "), (command, line)
        assert not wrong_cures(line, command), (command, line)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A regression after one step."""
    run_dir = tmp_path_factory.mktemp("tuned")
    settings = [*SETTINGS, f"run_dir={run_dir}", "train.max_steps=1", *TASK]
    train_model(settings, train=[("MKT", 1.0), ("LAGV", 4.0)])
    return run_dir
