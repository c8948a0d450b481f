"""Makes one small, sound input of every format that the package reads."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lmdb
import numpy as np
import openpyxl
import pyarrow
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import save_file

from esm2mega.cli.app import main
from esm2mega.convert.checksum import weights_sha256
from esm2mega.data.benchmarks.deeploc2 import LOCATIONS
from esm2mega.infer.work import Work
from tests import esm2fa, foreign, foreign_bert
from tests.foreign_configs import write_all
from tests.fuzz.subjects import TRAINING, WILD
from tests.unit.data.readers import test_megatron

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_LETTERS = list("LAGVSERTIDPKQNFYMHWC")


def _command(*words: str | Path) -> None:
    if code := main([str(word) for word in words]):
        raise AssertionError(f"{' '.join(map(str, words))} ended with {code}")


def make(folder: Path) -> None:
    """Make all inputs in a folder, which is empty.

    Args:
        folder: Gets a file or a folder for each subject, see `tests.fuzz.subjects`.
    """
    proteins = _proteins(24)
    _sequences(folder, proteins)
    _tables(folder, proteins)
    _benchmarks(folder)
    (folder / "theirs").mkdir()
    write_all(folder / "theirs")
    _ours(folder)
    _foreign(folder)


def _proteins(count: int) -> list[tuple[str, str]]:
    rng = np.random.default_rng(4)
    lengths = rng.integers(8, 60, count)
    return [(f"p{n}", "".join(rng.choice(_LETTERS, length))) for n, length in enumerate(lengths)]


def _sequences(folder: Path, proteins: list[tuple[str, str]]) -> None:
    """Proteins without labels, in every format of sequences."""
    fasta = "".join(f">{name} some words\n{text[:20]}\n{text[20:]}\n" for name, text in proteins)
    (folder / "x.fasta").write_text(fasta)
    (folder / "x.fasta.gz").write_bytes(gzip.compress(fasta.encode(), mtime=0))
    checked = {zstd.CompressionParameter.checksum_flag: 1}
    (folder / "x.fasta.zst").write_bytes(zstd.compress(fasta.encode(), options=checked))
    for name, separator in (("x.csv", ","), ("x.tsv", "\t")):
        rows = [("id", "sequence", "more"), *((name, text, "a b") for name, text in proteins)]
        (folder / name).write_text("".join(separator.join(row) + "\n" for row in rows))
    lines = [json.dumps({"id": name, "sequence": text}) for name, text in proteins]
    (folder / "x.jsonl").write_text("\n".join(lines) + "\n")
    table = pyarrow.table({"id": [n for n, _ in proteins], "sequence": [s for _, s in proteins]})
    parquet.write_table(table, folder / "x.parquet", row_group_size=10)
    _lmdb(folder / "pfam_train.lmdb", [{"primary": text, "id": name} for name, text in proteins])
    (folder / "indexed").mkdir()
    test_megatron.write(folder / "indexed", [test_megatron.ids(text) for _, text in proteins])
    for number, part in enumerate((proteins[:14], proteins[14:])):
        esm2fa.shard(folder / "esm2fa" / f"shard-{number:05d}", part)
    members = {f"UniRef50_{n}": proteins[3 * n : 3 * n + 3] for n in range(8)}
    mapping = ["uniref50\turef90"]
    mapping += [f"{name}\t{','.join(x for x, _ in rows)}" for name, rows in members.items()]
    (folder / "uniref").mkdir()
    (folder / "uniref" / "mapping.tsv").write_text("\n".join(mapping) + "\n")
    (folder / "uniref" / "uf90.fasta").write_text(fasta)
    representatives = "".join(f">{name}\n{rows[0][1]}\n" for name, rows in members.items())
    (folder / "uniref" / "uf50.fasta").write_text(representatives)
    _bionemo(folder / "bionemo", members)
    rows = [(c, n, s) for c, proteins in members.items() for n, s in proteins]
    names = ("ur50_id", "ur90_id", "sequence")
    columns = {name: [row[k] for row in rows] for k, name in enumerate(names)}
    parquet.write_table(pyarrow.table(columns), folder / "clusters.parquet")


def _bionemo(folder: Path, members: dict[str, list[tuple[str, str]]]) -> None:
    folder.mkdir()
    lists = [[name for name, _ in rows] for rows in members.values()]
    parquet.write_table(pyarrow.table({"ur90_id": lists}), folder / "train.parquet")
    parquet.write_table(pyarrow.table({"ur50_id": ["v1", "v2"]}), folder / "valid.parquet")
    inputs = {
        "train": [row for rows in members.values() for row in rows],
        "valid": [("v1", "MK"), ("v2", "W")],
    }
    for split, rows in inputs.items():
        database = sqlite3.connect(folder / f"{split}.db")
        with database:
            database.execute("CREATE TABLE protein (id TEXT PRIMARY KEY, sequence TEXT)")
            database.executemany("INSERT INTO protein VALUES (?, ?)", rows)
        database.close()


def _lmdb(path: Path, rows: list[dict[str, Any]]) -> None:
    environment = lmdb.open(str(path), map_size=1 << 18, subdir=False, lock=False)
    with environment, environment.begin(write=True) as transaction:
        for number, row in enumerate(rows):
            transaction.put(str(number).encode(), pickle.dumps(row))
        transaction.put(b"num_examples", pickle.dumps(len(rows)))


def _tables(folder: Path, proteins: list[tuple[str, str]]) -> None:
    """Proteins with labels, and variants."""
    parts = ("train", "train", "valid", "test")
    values = [
        {"id": name, "sequence": text, "value": text.count("L") + 0.5, "part": parts[number % 4]}
        for number, (name, text) in enumerate(proteins)
    ]
    states = [{"id": n, "sequence": s, "states": "".join("HEC"[ord(x) % 3] for x in s)} for n, s in proteins]
    lists = [
        {"id": n, "sequence": s, "names": json.dumps(["a", "b", "c"][: len(s) % 4])} for n, s in proteins
    ]
    for name, rows in (("values", values), ("states", states), ("names", lists)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    numbers = [{"sequence": s, "number": [float(ord(x) % 7) for x in s]} for _, s in proteins]
    (folder / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers))
    book = openpyxl.Workbook()
    for row in [list(values[0]), *(list(row.values()) for row in values)]:
        book.active.append(row)
    book.save(folder / "values.xlsx")
    (folder / "mutants").mkdir()
    (folder / "mutants" / "wt.fasta").write_text(f">wild\n{WILD}\n")
    changes = [f"{WILD[i]}{i + 1}W,{i}" for i in range(len(WILD))] + [f"{WILD[1]}2C:{WILD[2]}3D,1", "A4del,2"]
    (folder / "mutants" / "mutants.csv").write_text("\n".join(["mutant,value", *changes]) + "\n")
    _structures(folder / "structures", proteins[:3])
    mutants = [f"{WILD[i]}{i + 1}W,{i % 3}.5" for i in range(len(WILD))] + [f"{WILD[1]}2C:{WILD[2]}3D,1"]
    (folder / "variants.csv").write_text("\n".join(["mutant,DMS_score", *mutants]) + "\n")
    (folder / "proteingym" / "assays").mkdir(parents=True)
    header = "DMS_id,DMS_filename,UniProt_ID,target_seq,coarse_selection_type\n"
    row = f"A_X,A_X.csv,P_A,{WILD},Activity\n"
    (folder / "proteingym" / "reference.csv").write_text(header + row)
    lines = [line.replace(",", ",x,") for line in mutants]
    text = "\n".join(["mutant,mutated_sequence,DMS_score", *lines]) + "\n"
    (folder / "proteingym" / "assays" / "A_X.csv").write_text(text)
    settings = [setting.split("=") for setting in TRAINING]
    configuration: dict[str, Any] = {}
    for key, value in settings:
        section, _, name = key.partition(".")
        configuration.setdefault(section, {})[name] = yaml.safe_load(value)
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration))


def _structures(folder: Path, proteins: list[tuple[str, str]]) -> None:
    """Proteins with a place of each residue."""
    folder.mkdir()
    rng = np.random.default_rng(6)
    (folder / "x.fasta").write_text("".join(f">{name}\n{text}\n" for name, text in proteins))
    for name, text in proteins:
        places = rng.normal(scale=9.0, size=(len(text), 3)).round(3)
        rows = [f"{letter},{x},{y},{z}" for letter, (x, y, z) in zip(text, places, strict=True)]
        (folder / f"{name}.csv").write_text("\n".join(["residue,x,y,z", *rows]) + "\n")


def _benchmarks(folder: Path) -> None:
    """Published tasks, cut to some proteins."""
    rng = np.random.default_rng(5)
    (folder / "flip").mkdir()
    splits = (("train", "False"), ("train", "True"), ("test", "False"))
    entries = [
        f">s{n} TARGET={n / 4} SET={splits[n % 3][0]} VALIDATION={splits[n % 3][1]}\n{WILD[n:]}{WILD}\n"
        for n in range(9)
    ]
    (folder / "flip" / "two_vs_rest.fasta").write_text("".join(entries))
    made = ("--out", folder / "prepared", "--allow-other-sizes")
    _command("prepare", "flip", "gb1", "--source", folder / "flip", *made)
    (folder / "tape-task").mkdir()
    for split in ("train", "valid", "test"):
        rows = [{"primary": WILD[n:], "stability_score": np.array([n / 4], np.float32)} for n in range(5)]
        _lmdb(folder / "tape-task" / f"stability_{split}.lmdb", rows)
    names = ["", "ACC", "Kingdom", "Partition", "Membrane", *LOCATIONS, "Sequence"]
    with (folder / "deeploc.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for n in range(20):
            sequence = "".join(rng.choice(_LETTERS, 110))
            writer.writerow([n, f"P{n}", "Metazoa", n % 5, n % 2, *[float(n % 3 == 0)] * 10, sequence])


def _ours(folder: Path) -> None:
    """What this package itself writes."""
    fasta, model = folder / "x.fasta", folder / "run"
    _command("prepare", "fasta", fasta, "--out", folder / "stores", "--valid-size", "4", "--workers", "1")
    (folder / "stores" / "train").rename(folder / "store")
    uniref = [f"--{name}={folder}/uniref/{name}.fasta" for name in ("uf50", "uf90")]
    uniref += [f"--mapping={folder}/uniref/mapping.tsv", "--valid-size=2", f"--out={folder}/cluster-stores"]
    _command("prepare", "uniref", *uniref)
    (folder / "cluster-stores" / "train").rename(folder / "clusters")
    data = f"data.train={folder}/store"
    _command("pretrain", *TRAINING, data, f"run_dir={model}")
    last = model / "checkpoints" / "step_00000002"
    adapters = ["lora.rank=2", "lora.target_modules=[linear_qkv]", f"init_from={last}"]
    _command("pretrain", *TRAINING, *adapters, data, f"run_dir={folder}/adapted")
    labels = ["task.kind=regression", "task.target_columns=[value]", f"data.train={folder}/values.csv"]
    labels += [f"data.valid={folder}/values.csv", "data.allow_overlap=true"]
    _command("finetune", *TRAINING, *labels, f"run_dir={folder}/tuned")
    for name, run in (("checkpoint", model), ("adapter", folder / "adapted"), ("task", folder / "tuned")):
        (run / "checkpoints" / "step_00000002").rename(folder / name)
    (folder / "checkpoint").rename(last)
    shutil.copytree(last, folder / "checkpoint")
    (model / "incidents.jsonl").write_text('{"step": 1, "time": "2026-01-01T00:00:00", "policy": "skip"}\n')
    _command("embed", last, fasta, "--out", folder / "x.h5")
    _command("embed", last, fasta, "--out", folder / "b.h5", "--dtype", "bf16", "--include", "pooled,logits")
    _results(folder / "results", weights_sha256(folder / "checkpoint"))
    _command("lora", "export", folder / "adapter", "--out", folder / "peft")
    _unfinished(folder, ["embed", str(last), str(fasta), "--out", str(folder / "e" / "x.h5")])
    _unfinished(folder, ["predict", str(folder / "task"), str(fasta), "--out", str(folder / "p" / "x.h5")])


def _results(folder: Path, weights: str) -> None:
    """What a suite of benchmarks measured of the checkpoint."""
    folder.mkdir()
    row = {"row": "model", "model": "m", "mode": "probe", "value": 0.5, "low": 0.4, "high": 0.6}
    task = {"task": "flip/gb1", "metric": "spearman", "num_proteins": {"test": 9}, "rows": [row]}
    models = [{"name": "m", "weights_sha256": weights, "step": 2}]
    (folder / "results.json").write_text(json.dumps({"models": models, "tasks": [task]}, indent=1))


def _unfinished(folder: Path, words: list[str]) -> None:
    """An output of which every piece is noted, and that was killed before its end."""

    class Killed(BaseException):
        pass

    def kill(self: Work) -> None:
        raise Killed

    Path(words[-1]).parent.mkdir()
    with patch.object(Work, "finish", kill):
        try:
            main(words)
        except Killed:
            return
    raise AssertionError(f"{words} was not killed")


def _foreign(folder: Path) -> None:
    """Checkpoints of other programs."""
    truth = foreign.truth(torch.float32)
    for name in ("fair-esm", "cerebras", "parts"):
        (folder / name).mkdir()
    foreign.write_fair_esm(truth, folder / "fair-esm")
    foreign.write_hf(truth, folder)
    _sharded(folder, foreign.hf_state(truth))
    foreign.write_te(truth, folder)
    foreign.write_cerebras(truth, folder / "cerebras")
    foreign.write_nemo1(truth, folder)
    foreign.write_nemo1(truth, folder / "parts", tp=2, pp=2, mode="w:gz")
    foreign.write_nemo2(truth, folder)
    bert = foreign_bert.truth(torch.float32)
    foreign_bert.write_tape(bert, folder)
    foreign_bert.write_proteinlm(bert, folder)
    foreign_bert.write_megatron(bert, folder)


def _sharded(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Hugging Face in two files with an index, and in a file of PyTorch."""
    (folder / "sharded").mkdir()
    (folder / "hf-bin").mkdir()
    names, places = sorted(state), {}
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in names[number::2]}, folder / "sharded" / file)
        places |= dict.fromkeys(names[number::2], file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in state.values())}, "weight_map": places}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(state, folder / "hf-bin" / "pytorch_model.bin")
    for name in ("sharded", "hf-bin"):
        (folder / name / "config.json").write_text(json.dumps(foreign.HF_CONFIG))
