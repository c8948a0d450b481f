"""Read changed inputs with other libraries, and say in what the results of a command differ from these.

Each function gets the changed input, the folder of results and the words of the command, which ended with 0.
"""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Pairs = list[tuple[str, str]]

_TOLERANCE = 2e-4
"""Of logits of a size of some units, which both compute in fp32 with sums in another order."""


def _written(out: Path, words: Sequence[str]) -> Pairs | None:
    """Ids and sequences of the store that was made; None for another command."""
    if words[0] != "prepare":
        return None
    from esm2mega.data.store.token_store import TokenStore
    from esm2mega.vocabulary import decode

    store = TokenStore(out / "data" / "train")
    return [(store.id(row), decode(store.residues(row))) for row in range(len(store))]


def _compare(found: Pairs | None, read: Pairs) -> Iterator[str]:
    if found is None:
        return
    # Stop codons are dropped, as are blanks and ends of lines; the letter without a residue is unknown.
    ignored = str.maketrans({"*": "", " ": "", "\t": "", "\r": "", "\n": "", "J": "<unk>", "j": "<unk>"})
    read = [(name, text.translate(ignored).upper().replace("<UNK>", "<unk>")) for name, text in read]
    if len(found) != len(read):
        yield f"{len(found)} proteins, others read {len(read)}"
    for number, (ours, theirs) in enumerate(zip(found, read, strict=False)):
        if ours != theirs:
            yield f"protein {number} is {ours}, others read {theirs}"
            return


def fasta(it: Path, out: Path, words: Sequence[str]) -> Iterator[str]:
    from Bio import SeqIO

    with it.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        read = [(record.id, str(record.seq)) for record in SeqIO.parse(file, "fasta-pearson")]
    yield from _compare(_written(out, words), read)


def table(it: Path, out: Path, words: Sequence[str]) -> Iterator[str]:
    with it.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, delimiter="\t" if it.suffix == ".tsv" else ","))
    yield from _compare(_written(out, words), _named(rows))


def _named(rows: Sequence[dict[str, Any]]) -> Pairs:
    return [(str(row.get("id", n)), str(row["sequence"])) for n, row in enumerate(rows, 2)]


def json_lines(it: Path, out: Path, words: Sequence[str]) -> Iterator[str]:
    rows = [json.loads(line) for line in it.read_bytes().split(b"\n") if line.strip()]
    yield from _compare(_written(out, words), _named(rows))


def parquet(it: Path, out: Path, words: Sequence[str]) -> Iterator[str]:
    from pyarrow import parquet as library

    yield from _compare(_written(out, words), _named(library.read_table(it).to_pylist()))


def esm2fa(it: Path, out: Path, words: Sequence[str]) -> Iterator[str]:
    from pyarrow import ipc

    from esm2mega.vocabulary import VOCAB

    read = []
    for file in sorted(it.glob("shard-*/*.arrow")):
        for row in ipc.open_stream(file).read_all().to_pylist():
            text = "".join(VOCAB[token] for token in row["input_ids"])
            read.append((row["id"].split()[0], text.removeprefix("<cls>").partition("<eos>")[0]))
    yield from _compare(_written(out, words), read)


def lmdb(it: Path, out: Path, words: Sequence[str]) -> Iterator[str]:
    import lmdb as library

    with (
        library.open(str(it), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as t,
    ):
        rows = [pickle.loads(t.get(str(n).encode())) for n in range(pickle.loads(t.get(b"num_examples")))]
    yield from _compare(_written(out, words), [(str(row["id"]), row["primary"]) for row in rows])


def indexed(it: Path, out: Path, words: Sequence[str]) -> Iterator[str]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from esm2mega.data.readers.megatron import VOCAB

    data = IndexedDataset(str(it / "pfam_text_document"))
    read = ["".join(VOCAB[token] for token in data[n].tolist()) for n in range(len(data))]
    yield from _compare(_written(out, words), [(str(n), text) for n, text in enumerate(read, 1)])


def hdf5(it: Path, out: Path, words: Sequence[str]) -> Iterator[str]:
    """Compare the values of a file whose checksums hold with those of the sound one beside it."""
    sound, changed = content(it.parent.parent / "sound.h5"), content(it)
    if sound != changed:
        yield f"other values in {[name for name in sound if changed.get(name) != sound[name]]}"


def content(path: Path) -> dict[str, Any]:
    """Return all values, texts and attributes of an HDF5 file, as h5py reads them."""
    import h5py

    found: dict[str, Any] = {}
    with h5py.File(path) as file:

        def note(name: str, item: Any) -> None:
            found[name] = {key: repr(value) for key, value in item.attrs.items()}
            if isinstance(item, h5py.Dataset):
                found[f"{name} values"] = (str(item.dtype), item.shape, item[()].tolist())

        note("", file)
        file.visititems(note)
    return found


def hugging_face(it: Path, out: Path, words: Sequence[str]) -> Iterator[str]:
    """Compare logits with those of transformers."""
    if words[0] != "embed":
        return
    import h5py
    import torch
    from transformers import EsmForMaskedLM

    from esm2mega.vocabulary import encode_residues

    model = EsmForMaskedLM.from_pretrained(it).eval()
    from Bio import SeqIO

    proteins = [str(record.seq) for record in SeqIO.parse(words[2], "fasta")]
    with h5py.File(out / "x.h5") as file:
        ours, offsets = file["logits"][()], file["offsets"][()]
    for number in (0, len(proteins) // 2):
        ids = torch.tensor([[0, *encode_residues(proteins[number]).tolist(), 2]])
        with torch.no_grad():
            theirs = model(ids, attention_mask=torch.ones_like(ids)).logits[0, 1:-1].numpy()
        mine = ours[offsets[number] : offsets[number + 1]]
        scale = max(1.0, float(np.abs(theirs).max()))
        if mine.shape != theirs.shape or not np.abs(mine - theirs).max() < _TOLERANCE * scale:
            yield f"protein {number}: logits {mine.ravel()[:3]}, of transformers {theirs.ravel()[:3]}"


def peft(it: Path, out: Path, words: Sequence[str]) -> Iterator[str]:
    """Compare the multiset of values of all factors, which no arrangement changes."""
    from safetensors.numpy import load_file

    from esm2mega.checkpoint.tensors import TensorReader

    theirs = np.sort(
        np.concatenate([x.ravel() for x in load_file(it / "adapter_model.safetensors").values()])
    )
    reader = TensorReader(out / "adapter")
    ours = np.sort(np.concatenate([reader.read(name).numpy().ravel() for name in reader.index]))
    if ours.shape != theirs.shape or not np.array_equal(ours, theirs):
        yield f"{ours.size} values of factors are not the {theirs.size} that safetensors reads"
