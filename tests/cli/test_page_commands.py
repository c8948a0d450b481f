"""Every command that README and docs print exists, with its options; test_page_walk.py runs them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from esm2mega.cli.app import cli
from esm2mega.config.best_metric import check_best_metric
from esm2mega.config.load import given_keys, load_run
from esm2mega.config.split import has_valid
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate
from esm2mega.finetune.defaults import provisional
from tests.cli.pages import COMMANDS, PAGES, ROOT, TEXT, Command, commands, name_of, spans

# First words of commands that install, activate or hand over to what is checked elsewhere.
UNCHECKED = {".", "cd", "docker", "export", "git", "pip", "python3.11", "python3.12", "pytest"}


def parse_with_click(words: Sequence[str]) -> tuple[str, dict[str, object]]:
    """Parse the words behind `esm2mega` down to the last command, without running it."""
    command: click.Command = cli
    arguments, path = list(words), "esm2mega"
    while True:
        context = command.make_context(path, arguments)
        if not isinstance(command, click.Group):
            return path, context.params
        name, found, arguments = command.resolve_command(
            context, [*getattr(context, "_protected_args", ()), *context.args]
        )
        assert name is not None and found is not None
        command, path = found, f"{path} {name}"


def check_esm2mega(words: Sequence[str], world_size: int) -> None:
    path, params = parse_with_click(words)
    if path == "esm2mega pretrain":
        config, overrides = params["config"], params["overrides"]
        assert isinstance(overrides, tuple)
        run = load_run(None if config is None else str(config), overrides)
        validate(run, world_size)
        # What `check_training_inputs` asks for, without the stores being there.
        assert run.data.train is not None
        assert run.data.valid is not None or not run.train.eval_every, "evaluates without data.valid"
    elif path == "esm2mega finetune":
        config, overrides = params["config"], params["overrides"]
        assert isinstance(overrides, tuple)
        config = None if config is None else str(config)
        given = given_keys(config, overrides)
        # The shape is that of a checkpoint which is not there.
        shape = [] if "model.size" in given or "init_from" not in given else ["model.size=tiny"]
        run = load_run(config, [*shape, *overrides])
        run = provisional(run, given, has_valid(run.data))
        validate(run, world_size)
        validate_task(run)
        check_best_metric(run.checkpoint, run.task, has_valid(run.data))


def check_torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    launch = get_args_parser().parse_args(list(words))
    assert launch.module and launch.training_script == "esm2mega"
    world_size = int(launch.nnodes.split(":")[-1]) * int(launch.nproc_per_node)
    check_esm2mega(launch.training_script_args, world_size)


def check_make(words: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} \?=" if equals else rf"^{re.escape(name)}:.*## "
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {name}"


def check_script(path: str, variables: Sequence[str]) -> None:
    text = (ROOT / path).read_text()
    for variable in variables:
        assert re.search(rf"^#   {variable} ", text, re.MULTILINE), f"{path} does not document {variable}"


def check(command: Command) -> None:
    first, *rest = command.words
    program = first.rpartition("/")[2]
    if program == "esm2mega":
        check_esm2mega(rest, 1)
    elif program == "torchrun":
        check_torchrun(rest)
    elif program == "make":
        check_make(rest)
    elif program == "python" and rest[:2] == ["-m", "esm2mega"]:
        check_esm2mega(rest[2:], 1)
    elif first.startswith("examples/"):
        check_script(first, command.variables)
    elif program == "sbatch":
        check_script(rest[-1], command.variables)
    elif program == "python" and rest[0] != "-c":
        assert (ROOT / rest[0]).is_file()
    else:
        assert program in UNCHECKED or program == "python", f"no check for {command.line}"


@pytest.mark.parametrize(
    "command",
    [command for _, command in COMMANDS],
    ids=[f"{page.name}: {command.line[:50]}" for page, command in COMMANDS],
)
def test_command_exists_with_its_options(command: Command) -> None:
    if command.words:
        check(command)


def test_no_page_writes_the_same_output_twice() -> None:
    """An output that exists is refused, so who pastes the commands one after the other would be stopped."""
    twice = []
    for page in PAGES:
        seen: set[str] = set()
        for command in commands(TEXT[page]):
            words = command.words
            if "esm2mega" in words and "--out" in words and not {"--resume", "--overwrite"} & set(words):
                out = words[words.index("--out") + 1]
                twice += [f"{page.name}: {command.line}"] * (out in seen)
                seen.add(out)
    assert not twice


def test_the_check_of_commands_can_fail() -> None:
    for line in (
        "esm2mega pretrian",
        "esm2mega prepare fasta x.fasta --outdir y",
        "torchrun --processes 2 -m esm2mega doctor",
        "torchrun --nproc-per-node 3 -m esm2mega pretrain --config base model.size=tiny data.train=x",
        "esm2mega pretrain --config pretrain_esm2_9M data.train=x data.valid=y",
        "esm2mega pretrain --config pretrain_esm2_tiny data.train=x",
        "make quickstart2",
        "make test SPEED=9",
        "NODES=2 examples/pretrain_torchrun_multinode.sh",
        "sbatch examples/absent.sbatch",
        "curl x",
    ):
        with pytest.raises((Exception, SystemExit)):
            check(Command(line))


def test_every_target_of_the_makefile_is_explained() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "README.md").read_text()
    assert [name for name in targets if not re.search(rf"\bmake {name}\b(?!-)", text)] == ["help", "clean"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_text_exist(page: Path) -> None:
    for span in spans(page):
        words = span.split()
        if words[0] == "make" and len(words) > 1:
            check_make(shlex.split(span)[1:])
        if words[0] == "esm2mega" and len(words) > 1 and not words[1].startswith("-"):
            command: click.Command = cli
            for word in words[1:]:
                if not isinstance(command, click.Group):
                    break
                assert word in command.commands, f"{name_of(page)}: {span}"
                command = command.commands[word]
