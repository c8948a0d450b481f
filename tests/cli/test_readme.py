"""README and docs: commands run as printed, the tree is the real one, links, keys and paths exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import click
import h5py
import numpy as np
import pytest

from esm2mega.cli.app import cli
from esm2mega.config.load import known_keys, load_run
from esm2mega.config.schema import EarlyStoppingConfig, Run
from esm2mega.config.validate import validate
from esm2mega.data.store.token_store import TokenStore
from esm2mega.data.stream.build import StreamState
from esm2mega.vocabulary import VOCAB
from tests import warm

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RUNS = ROOT / "docs" / "runs.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "tools" / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
README_LINES = 250
TEXT = {page: page.read_text() for page in PAGES}

# Appended to the README's training commands, which are otherwise taken word by word.
SMALL = (
    "data.max_seq_length=64",
    "train.micro_batch_tokens=256",
    "train.global_batch_tokens=512",
    "train.eval_every=1",
    "train.eval_batches=4",
    "train.log_every=1",
    "schedule.warmup_steps=0",
)
STEPS_PER_START = 2

# First words of commands that install, activate or hand over to what is checked elsewhere.
UNCHECKED = {".", "docker", "export", "pip", "python3.11", "python3.12", "pytest"}

# Commands of the README that the walk below does not run, by their first words: the test that runs them and
# how it is seen there. None stands for what no test can run: it needs a network, GPUs or a container.
RUN_ELSEWHERE = {
    "python3.11 -m venv": None,
    ". venv/bin/activate": None,
    "pip install": None,
    "docker build": None,
    "torchrun --standalone --nproc-per-node 8": None,
    "make test": None,
    "make quickstart": ("tests/cli/test_packaging.py", '["make", "quickstart"'),
    "esm2mega prove --layouts ci": ("tests/distributed/test_layouts.py", '["prove", "--layouts", "ci"'),
    "examples/pretrain_torchrun_multinode.sh": (
        "tests/cli/test_examples.py",
        "pretrain_torchrun_multinode.sh",
    ),
    "sbatch --nodes 4 examples/pretrain_slurm.sbatch": (
        "tests/cli/test_examples.py",
        "pretrain_slurm.sbatch",
    ),
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language; a block without a language is of the language ''."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def spans(page: Path) -> list[str]:
    """Everything in single backticks outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


@dataclass(frozen=True)
class Command:
    """A command of a bash block, on one line, and its words without leading variable assignments."""

    line: str

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        return words

    @property
    def variables(self) -> list[str]:
        return re.findall(r"^[A-Z_]+(?==)|(?<= )[A-Z_]+(?==)", self.line.partition(" examples/")[0])


def commands(text: str) -> list[Command]:
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks(text, "bash"))).splitlines()
    return [Command(line) for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = [(page, command) for page in PAGES for command in commands(TEXT[page])]


def walk() -> list[Command]:
    """The README's way with one's own FASTA: the recipes up to those that prove, or need several machines."""
    section = re.search(r"^## Recipes$(.*?)^### Prove$", TEXT[README], re.MULTILINE | re.DOTALL)
    assert section is not None
    return commands(section.group(1))


# --- The walk ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walked:
    """Where the walk took place, and what each command printed."""

    folder: Path
    output: dict[str, str]

    @property
    def run_dir(self) -> Path:
        return self.folder / "runs" / "mine"

    def records(self, kind: str) -> list[dict[str, float]]:
        lines = (self.run_dir / "log.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]


def write_fasta(path: Path, count: int = 430) -> None:
    """Short random proteins, more than the README holds out."""
    rng = np.random.default_rng(5)
    letters = np.frombuffer("".join(VOCAB[4:24]).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        for number, length in enumerate(rng.integers(8, 40, count)):
            file.write(b">p%d\n%s\n" % (number, rng.choice(letters, size=length).tobytes()))


def write_labels(folder: Path) -> None:
    """Tables of labelled proteins, and proteins to predict, under the names of the recipe."""
    records = (folder / "my_proteins.fasta").read_text().split()
    sequences = records[1:61:2]
    rows = [f"{sequence},{len(sequence) / 100}" for sequence in sequences]
    for name, part in (("train.csv", rows[:24]), ("valid.csv", rows[24:])):
        (folder / name).write_text("\n".join(["sequence,fitness", *part]) + "\n")
    (folder / "new_proteins.fasta").write_text("\n".join(records[:20]) + "\n")


def path_with_commands(folder: Path) -> str:
    """A search path on which `esm2mega` and `torchrun` are those of this interpreter and this checkout."""
    folder.mkdir()
    for name, module in (("esm2mega", "esm2mega"), ("torchrun", "torch.distributed.run")):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n')
        script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def run_line(line: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command of ours alone starts warm; the shell runs any other."""
    words = shlex.split(line, comments=True)
    if words[0] == "esm2mega":
        return warm.run(["-m", *words], environment, folder)
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Walked:
    folder = tmp_path_factory.mktemp("walk")
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    environment |= {
        "PATH": path_with_commands(tmp_path_factory.mktemp("commands") / "bin"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    write_fasta(folder / "my_proteins.fasta")
    write_labels(folder)
    output, starts = {}, 0
    for command in walk():
        line = command.line
        if "pretrain" in command.words:
            starts += 1
            line += f" {shlex.join(SMALL)} train.max_steps={starts * STEPS_PER_START}"
        elif "finetune" in command.words:
            line += f" {shlex.join(SMALL)} train.max_steps={STEPS_PER_START}"
            if "data.valid=valid.csv" not in command.words:
                line += " train.eval_every=0"
        done = run_line(line, folder, environment)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        output[command.line] = done.stdout + done.stderr
    return Walked(folder, output)


def test_the_walk_has_all_its_steps() -> None:
    done = [" ".join(word for word in command.words if word in cli.commands) for command in walk()]
    assert done == [
        *("prepare", "pretrain", "evaluate", "plot", "inspect", "inspect", "pretrain"),
        *("convert", "embed", "score"),
        *("finetune", "predict", "finetune", "lora"),
    ]


def test_every_command_of_the_readme_is_run() -> None:
    others = [command for command in commands(TEXT[README]) if command not in walk()]
    found = set()
    for command in others:
        text = shlex.join(command.words)
        starts = [start for start in RUN_ELSEWHERE if text.startswith(start)]
        assert len(starts) == 1, f"no test runs {command.line}"
        found.update(starts)
    assert found == set(RUN_ELSEWHERE)
    for page, text in filter(None, RUN_ELSEWHERE.values()):
        assert text in (ROOT / page).read_text(), f"{page} does not run {text}"


def test_readme_is_short() -> None:
    assert len(TEXT[README].splitlines()) <= README_LINES


@pytest.mark.distributed
def test_walk_writes_what_the_docs_list(walked: Walked) -> None:
    last = walked.run_dir / "checkpoints" / f"step_{2 * STEPS_PER_START:08d}"
    assert (last / "COMPLETE").is_file()
    listing = next(block for block in blocks(TEXT[RUNS], "") if block.startswith("runs/mine/"))
    listed = set(re.findall(r"^  ([a-z.]+)(?:, ([a-z.]+))?(?=[ /])", listing, re.MULTILINE))
    names = {name for pair in listed for name in pair if name}
    # The listing is complete, besides the file that the README's own command put there.
    assert names == {path.name for path in walked.run_dir.iterdir()} - {"evaluation.json"}
    assert len(TokenStore(walked.folder / "my_store" / "valid")) == 400


@pytest.mark.distributed
def test_walk_resumes_and_logs_each_step_once(walked: Walked) -> None:
    assert [record["step"] for record in walked.records("train")] == [1, 2, 3, 4]
    assert [record["step"] for record in walked.records("eval")] == [1, 2, 3, 4]
    resumed = [text for line, text in walked.output.items() if "train.max_steps=800" in line]
    assert "resumed from step_00000002 at step 2" in resumed[0]


@pytest.mark.distributed
def test_records_have_the_fields_that_the_docs_name(walked: Walked) -> None:
    flat = " ".join(TEXT[RUNS].split())
    for kind, pattern in (
        ("train", r"A training record has `([^`]+)`"),
        ("eval", r"an evaluation record `([^`]+)`"),
    ):
        found = re.search(pattern, flat)
        assert found is not None
        assert set(found.group(1).split(", ")) == set(walked.records(kind)[-1]) - {"kind"}


@pytest.mark.distributed
def test_evaluation_and_inspection_say_what_the_readme_says(walked: Walked) -> None:
    numbers = json.loads((walked.run_dir / "evaluation.json").read_text())
    assert {"loss", "perplexity", "unigram_loss"} <= set(numbers)
    (checkpoint,) = (text for line, text in walked.output.items() if line == "esm2mega inspect runs/mine")
    assert "weights sha256" in checkpoint and "rotary.inv_freq" in checkpoint
    (store,) = (text for line, text in walked.output.items() if line == "esm2mega inspect my_store/train")
    assert "30 sequences" in store and "checksums hold" in store


@pytest.mark.distributed
def test_embeddings_and_scores_are_there(walked: Walked) -> None:
    with h5py.File(walked.folder / "my_proteins.h5") as file:
        assert len(file["ids"]) == 430
        assert file["offsets"][-1] == len(file["residue/layer_4"])
    assert len((walked.folder / "scan.csv").read_text().splitlines()) == 1 + 22 * 19
    assert (walked.folder / "scan.png").is_file()


@pytest.mark.distributed
def test_finetuned_models_predict_and_merge(walked: Walked) -> None:
    lines = (walked.folder / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 10
    assert lines[0].split(",")[0] == "id"
    step = f"step_{STEPS_PER_START:08d}"
    for run in ("fitness", "adapted"):
        assert (walked.folder / "runs" / run / "checkpoints" / step / "COMPLETE").is_file()
    assert (walked.folder / "adapted_whole" / "COMPLETE").is_file()


@pytest.mark.distributed
def test_python_blocks_of_the_docs_run(walked: Walked) -> None:
    for copy in ("one", "two"):
        shutil.copytree(walked.run_dir, walked.folder / "runs" / copy)
    code = {page: blocks(TEXT[page], "python") for page in PAGES}
    assert sum(map(len, code.values())) >= 3
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for page, texts in code.items():
        for text in texts:
            done = warm.run(["-c", text], environment, walked.folder)
            assert done.returncode == 0, f"{name_of(page)}\n{text}\n{done.stderr}"
            assert done.stdout.strip(), f"{name_of(page)}: prints nothing\n{text}"


# --- All other commands -----------------------------------------------------------------------------------


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


# --- What the pages say -----------------------------------------------------------------------------------


def printed_tree() -> Iterator[tuple[str, str]]:
    """(folder, clause) of each line of the README's tree of the package."""
    tree = next(block for block in blocks(TEXT[README], "") if block.startswith("esm2mega/\n"))
    parents: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, clause = line.strip().partition(" ")
        parents[depth:] = [name]
        yield "".join(parents), clause.strip()


def test_tree_is_that_of_the_package() -> None:
    printed = [folder for folder, _ in printed_tree()]
    real = {path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / "esm2mega").rglob("*.py")}
    assert sorted(printed) == sorted(real)


def test_every_folder_of_the_tree_has_a_clause() -> None:
    assert [folder for folder, clause in printed_tree() if folder != "esm2mega/" and not clause] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name_of(page)} links to {target}"


def test_readme_links_every_page_of_the_docs() -> None:
    assert [page.name for page in DOCS if f"](docs/{page.name})" not in TEXT[README]] == []


SECTIONS = {key.partition(".")[0] for key in known_keys() if "." in key}
KEYS = {*known_keys(), "train.early_stopping"}


def mentioned_keys(page: Path) -> Iterator[str]:
    """Whatever looks like a configuration key in backticks: section.name, or name=value on its own."""
    dotted = re.compile(rf"(?<![\w./-])(?:{'|'.join(sorted(SECTIONS))})(?:\.[a-z_]+)+(?![\w(/])")
    for span in spans(page):
        yield from dotted.findall(span)
        for word in span.split():
            if found := re.fullmatch(r"([a-z_]+(?:\.[a-z_]+)*)=[^=\"'\s]+", word):
                yield found.group(1)


@pytest.mark.parametrize("page", [README, *DOCS], ids=name_of)
def test_configuration_keys_exist(page: Path) -> None:
    # `key=value` is the form itself; is_host is torchrun's.
    assert [key for key in mentioned_keys(page) if key not in KEYS | {"key", "is_host"}] == []


def test_keys_are_found_in_the_text() -> None:
    found = {key for page in (README, *DOCS) for key in mentioned_keys(page)}
    assert {"train.micro_batch_tokens", "checkpoint.resume", "init_from", "optim.lr"} <= found
    assert {field.name for field in fields(Run)} >= SECTIONS
    assert {f"train.early_stopping.{field.name}" for field in fields(EarlyStoppingConfig)} <= KEYS


@pytest.mark.parametrize("page", [README, *DOCS], ids=name_of)
def test_paths_exist(page: Path) -> None:
    tops = "esm2mega|tests|conf|examples|benchmarks|docs|tools"
    for span in spans(page):
        for word in span.split():
            if re.fullmatch(rf"(?:{tops})/[\w./*-]*", word):
                assert list(ROOT.glob(word.rstrip("/"))), f"{name_of(page)}: {word}"
            elif re.fullmatch(r"[a-z0-9_]+\.py", word):
                assert any(ROOT.glob(f"*/**/{word}")), f"{name_of(page)}: {word}"


@pytest.mark.parametrize("page", [README, *DOCS], ids=name_of)
def test_yaml_blocks_are_valid_configurations(page: Path, tmp_path: Path) -> None:
    for text in blocks(TEXT[page], "yaml"):
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        validate(load_run(str(file)), 1)


def test_extras_are_those_of_setup_py() -> None:
    table = TEXT[README].partition("| extra |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    shipped = re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(shipped)


def test_what_a_checkpoint_refuses_is_what_the_docs_say() -> None:
    """The keys of the stream's identity are those in the table of refused changes, the store aside."""
    from esm2mega.config.schema import DataConfig
    from esm2mega.data.stream.build import BatchSpec
    from esm2mega.data.stream.loader import TrainStream

    class Store:
        lengths = np.array([5], dtype=np.int32)
        fingerprint = "x"
        clusters = None

        def __len__(self) -> int:
            return 1

    stream = TrainStream([Store()], BatchSpec(DataConfig(), 2048, 1))  # type: ignore[list-item]
    assert stream.state == StreamState()
    identity = {key for key in stream.state_dict()["identity"] if key in KEYS}
    (row,) = re.findall(
        r"^\| content of the store, (.*?) \| refused", TEXT[ROOT / "docs/checkpoints.md"], re.M
    )
    assert set(re.findall(r"`([^`]+)`", row)) == identity
