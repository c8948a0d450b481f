"""Lists what is changed, the commands that read it, and what they may do then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.runs import SETTINGS
from tests.foreign_configs import FILES

OURS, CRC, PLAIN = "ours", "crc", "plain"
"""A format of ours with checksums; one of others with a CRC over the numbers; one without a checksum."""

WILD = "MKTAYIAKQR"

TRAINING = (
    *SETTINGS,
    "model.num_layers=2",
    "data.max_seq_length=128",
    "train.micro_batch_tokens=256",
    "train.global_batch_tokens=512",
    "train.max_steps=2",
    "train.eval_every=0",
    "checkpoint.save_every=1",
    "logging.samples=true",
)
"""A training of a tenth of a second, whose checkpoints the commands read."""

Words = Sequence[str]


@dataclass(frozen=True)
class Subject:
    """A file or folder that is changed.

    Attributes:
        name: Its name in the journal.
        path: The sound input.
        rule: `OURS`, `CRC` or `PLAIN`.
        commands: Words of the commands that read it: ``{it}`` is the changed copy, ``{out}`` an empty folder.
        files: Shell patterns of the files in the folder that are changed.
        witness: Name of the function in `tests.fuzz.witnesses` that says what an independent reader finds.
        uncovered: Shell patterns of files in it that carry no CRC.
    """

    name: str
    path: Path
    rule: str
    commands: tuple[Words, ...]
    files: tuple[str, ...] = ("*",)
    witness: str | None = None
    uncovered: tuple[str, ...] = ()


def subjects(folder: Path) -> list[Subject]:
    """Return all subjects, given the folder that `tests.fuzz.inputs.make` has filled."""
    return [*_ours(folder), *_checkpoints(folder), *_sequences(folder), *_tables(folder)]


def _ours(folder: Path) -> Iterator[Subject]:
    fasta, model = f"{folder}/x.fasta", f"{folder}/checkpoint"
    embed = ("embed", "{it}", fasta, "--out", "{out}/x.h5")
    evaluate = ("evaluate", "{it}", "--data", f"{folder}/store")
    inspect, verify = ("inspect", "{it}"), ("inspect", "--verify", "{it}")
    start = ("pretrain", *TRAINING, "run_dir={out}/run", "train.max_steps=1")
    data = f"data.train={folder}/store"
    yield Subject(
        "checkpoint",
        folder / "checkpoint",
        OURS,
        (
            embed,
            evaluate,
            inspect,
            verify,
            ("convert", "{it}", "{out}/hf", "--to", "hf"),
            ("score", "{it}", "--sequence", WILD, "--out", "{out}/x.csv"),
            ("compare", "{it}", model, "--data", f"{folder}/store"),
            (*start, data, "init_from={it}"),
        ),
    )
    tuned = ("predict", "{it}", fasta, "--out", "{out}/x.csv")
    yield Subject(
        "task",
        folder / "task",
        OURS,
        (tuned, ("evaluate", "{it}", "--data", f"{folder}/values.csv"), inspect),
    )
    merge, export = (("lora", word, "{it}", "--out", f"{{out}}/{word}") for word in ("merge", "export"))
    yield Subject("adapter", folder / "adapter", OURS, (embed, merge, export, inspect, evaluate))
    resume = ("pretrain", *TRAINING, data, "run_dir={it}", "train.max_steps=3")
    yield Subject("run", folder / "run", OURS, (resume,), ("checkpoints/*",))
    yield Subject(
        "store",
        folder / "store",
        OURS,
        (
            ("evaluate", model, "--data", "{it}"),
            ("embed", model, "{it}", "--out", "{out}/x.h5"),
            ("compare", model, model, "--data", "{it}"),
            inspect,
            (*start, "data.train={it}"),
        ),
    )
    yield Subject("cluster-store", folder / "clusters", OURS, (inspect, (*start, "data.train={it}")))
    labels = ("--labels", f"{folder}/values.csv")
    probe = ("probe", "{it}", *labels, "--split-column", "part", "--out", "{out}/probe", "task.bootstrap=0")
    probe += ("task.kind=regression", "task.target_columns=[value]")
    mapped = ("map", "{it}", *labels, "--column", "value", "--out", "{out}/map.html")
    yield Subject("hdf5", folder / "x.h5", OURS, (inspect, probe, mapped), witness="hdf5")
    yield Subject("hdf5-bf16", folder / "b.h5", OURS, (inspect,), witness="hdf5")
    for name, command, checkpoint in (
        ("e", "embed", f"{folder}/run@step_2"),
        ("p", "predict", f"{folder}/task"),
    ):
        words = (command, checkpoint, fasta, "--out", "{it}/x.h5", "--resume")
        yield Subject(f"{command}-journal", folder / name, OURS, (words,))
    tuning = ("finetune", *TRAINING, "task.kind=regression", "task.target_columns=[value]", "run_dir={it}")
    tuning += (
        f"data.train={folder}/values.csv",
        f"data.valid={folder}/values.csv",
        "data.allow_overlap=true",
    )
    yield Subject("task-run", folder / "tuned", OURS, (tuning,), ("checkpoints/*",))
    read = (("plot", "{it}"), ("watch", "{it}", "--once"))
    yield Subject("log", folder / "run", PLAIN, read, ("log.jsonl", "incidents.jsonl"))
    card = ("convert", model, "{out}/hf", "--to", "hf", "--results", "{it}")
    yield Subject("results", folder / "results", PLAIN, (card,), ("results.json",))


def _checkpoints(folder: Path) -> Iterator[Subject]:
    """Yield what `convert` reads, and the adapters of PEFT."""
    fasta = f"{folder}/x.fasta"

    def reading(name: str, path: str, rule: str, file: str = "", uncovered: tuple[str, ...] = ()) -> Subject:
        it = f"{{it}}/{file}" if file else "{it}"
        words = ("convert", it, "{out}/ours", "--to", "esm2mega")
        others = (("inspect", it), ("embed", it, fasta, "--out", "{out}/x.h5", "--include", "logits"))
        verified = rule == PLAIN or bool(uncovered)
        commands = ((*words, "--verify") if verified else words, *others)
        witness = "hugging_face" if name.startswith("hf") and rule == PLAIN else None
        return Subject(name, folder / path, rule, commands, witness=witness, uncovered=uncovered)

    yield reading("hf", "hf", PLAIN)
    yield reading("hf-sharded", "sharded", PLAIN)
    yield reading("hf-bin", "hf-bin", CRC, uncovered=("config.json",))
    yield reading("fair-esm", "fair-esm", CRC, "esm2_x.pt")
    yield reading("te", "te", PLAIN)
    yield reading("cerebras", "cerebras", CRC, "x.mdl", ("*.yaml",))
    yield reading("nemo1", "x.nemo", CRC)
    yield reading("nemo1-parts", "parts", CRC, "x.nemo")
    yield reading("nemo2", "nemo2", CRC, uncovered=("io.json", ".metadata"))
    yield reading("tape", "tape", PLAIN)
    yield reading("proteinlm", "proteinlm", PLAIN)
    yield reading("megatron", "megatron", CRC, uncovered=("*.txt",))
    base = ("--base", f"{folder}/run@step_2", "--out", "{out}/adapter")
    yield Subject("peft", folder / "peft", PLAIN, (("lora", "import", "{it}", *base),), witness="peft")


def _sequences(folder: Path) -> Iterator[Subject]:
    """Yield proteins without labels."""
    model = f"{folder}/checkpoint"
    made = ("--out", "{out}/data", "--valid-size", "0", "--workers", "1")
    prepare, embed = ("prepare", "fasta", "{it}", *made), ("embed", model, "{it}", "--out", "{out}/x.h5")
    yield Subject("fasta", folder / "x.fasta", PLAIN, (prepare, embed), witness="fasta")
    yield Subject("fasta-gz", folder / "x.fasta.gz", CRC, (prepare, embed))
    yield Subject("fasta-zst", folder / "x.fasta.zst", CRC, (prepare, embed))
    yield Subject("csv", folder / "x.csv", PLAIN, (prepare, embed), witness="table")
    yield Subject("tsv", folder / "x.tsv", PLAIN, (prepare,), witness="table")
    yield Subject("jsonl", folder / "x.jsonl", PLAIN, (prepare, embed), witness="json_lines")
    yield Subject("parquet", folder / "x.parquet", PLAIN, (prepare, embed), witness="parquet")
    yield Subject("lmdb", folder / "pfam_train.lmdb", PLAIN, (prepare,), witness="lmdb")
    indexed = ("prepare", "fasta", "{it}/pfam_text_document.idx", *made)
    yield Subject("indexed", folder / "indexed", PLAIN, (indexed,), witness="indexed")
    train = ("pretrain", *TRAINING, "run_dir={out}/run", "train.max_steps=1", "data.train={it}")
    yield Subject("esm2fa", folder / "esm2fa", PLAIN, (prepare, embed, train), witness="esm2fa")
    uniref = tuple(f"--{name}={{it}}/{name}.fasta" for name in ("uf50", "uf90"))
    splits = ("--mapping={it}/mapping.tsv", "--valid-size=2", "--out={out}/data")
    yield Subject("uniref", folder / "uniref", PLAIN, (("prepare", "uniref", *uniref, *splits),))
    bionemo = tuple(
        f"--{split}-{kind}-path={{it}}/{split}.{ending}"
        for split in ("train", "valid")
        for kind, ending in (("cluster", "parquet"), ("database", "db"))
    )
    yield Subject(
        "bionemo", folder / "bionemo", PLAIN, (("prepare", "uniref", *bionemo, "--out={out}/data"),)
    )
    table = ("prepare", "uniref", "--table={it}", "--out={out}/data")
    yield Subject("cluster-table", folder / "clusters.parquet", PLAIN, (table,))


def _tables(folder: Path) -> Iterator[Subject]:
    """Yield labels, variants, benchmarks and configurations."""
    model = f"{folder}/checkpoint"
    tuning = ("finetune", *TRAINING, "train.max_steps=1", "run_dir={out}/run", "data.train={it}")
    for name, kind, column in (
        ("values.csv", "regression", "value"),
        ("states.csv", "token_classification", "states"),
        ("names.csv", "multilabel", "names"),
        ("numbers.jsonl", "token_regression", "number"),
    ):
        words = (*tuning, f"task.kind={kind}", f"task.target_columns=[{column}]")
        yield Subject(name.replace(".", "-"), folder / name, PLAIN, (words,))
    # What is not read of a workbook, such as its styles, carries a CRC as well.
    words = (*tuning, "task.kind=regression", "task.target_columns=[value]")
    yield Subject("excel", folder / "values.xlsx", CRC, (words,))
    mutants = (*words[:-2], "data.wild_type={it}/wt.fasta", "data.train={it}/mutants.csv", *words[-2:])
    yield Subject("mutants", folder / "mutants", PLAIN, (mutants,))
    mapped = ("map", f"{folder}/x.h5", "--labels", "{it}", "--column", "value", "--out", "{out}/map.html")
    yield Subject("map-labels", folder / "values.csv", PLAIN, (mapped,))
    contacts = ("prepare", "contacts", "--source", "{it}", "--out", "{out}/contacts")
    yield Subject("structures", folder / "structures", PLAIN, (contacts,))
    prepared = (*words, "data.train={it}/train.csv", "task.target_columns=[target]")
    yield Subject("prepared", folder / "prepared", PLAIN, (("inspect", "{it}"), prepared))
    score = ("score", model, "--sequence", WILD, "--variants", "{it}", "--out", "{out}/x.csv")
    yield Subject("variants", folder / "variants.csv", PLAIN, ((*score, "--measured", "DMS_score"),))
    gym = (
        "score",
        model,
        "--proteingym",
        "{it}/reference.csv",
        "--assays",
        "{it}/assays",
        "--out",
        "{out}/gym",
    )
    yield Subject("proteingym", folder / "proteingym", PLAIN, ((*gym, "--strategy", "wt-marginals"),))
    flip = ("prepare", "flip", "gb1", "--source", "{it}", "--out", "{out}/flip", "--allow-other-sizes")
    yield Subject("flip", folder / "flip", PLAIN, (flip,))
    tape = ("prepare", "tape", "stability", "--source", "{it}", "--out", "{out}/tape")
    yield Subject("tape-task", folder / "tape-task", PLAIN, (tape,))
    deeploc = ("prepare", "deeploc2", "--source", "{it}", "--out", "{out}/deeploc")
    yield Subject("deeploc2", folder / "deeploc.csv", PLAIN, (deeploc,))
    configured = ("pretrain", "--config", "{it}", f"data.train={folder}/store", "run_dir={out}/run")
    yield Subject("config", folder / "config.yaml", PLAIN, ((*configured, "train.max_steps=1"),))
    # The translation of a changed file is another one; that no key is lost is for the unit tests.
    translate = ("translate", "{it}", "--out", "{out}/ours.yaml")
    for name in FILES:
        yield Subject(f"their-{Path(name).stem}", folder / "theirs" / name, PLAIN, (translate,))
