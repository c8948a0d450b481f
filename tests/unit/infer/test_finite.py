"""A model that gives NaN or infinity is refused: a line that names the protein, and no output."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import esm2mega
from esm2mega.cli.app import main
from esm2mega.data.store.prepare import prepare_fasta
from esm2mega.errors import UserError
from esm2mega.vocabulary import VOCAB
from tests.checkpoints import changed_weights
from tests.infer_models import LETTERS, Reference, write_fasta

PROTEINS = [("clean", "MKTAYIAKQR"), ("bad", "MKTWAYIAKQ"), ("worse", "WWMKT")]
TABLE = "embedding.word_embeddings.weight"


def _nan_for_w(table: torch.Tensor) -> None:
    """The hidden states of proteins with tryptophan, and all logits, are not numbers."""
    table[VOCAB.index("W"), 3] = torch.nan


def _infinite(weight: torch.Tensor) -> None:
    weight[0] = torch.inf


@pytest.fixture(scope="module")
def damaged(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("damaged") / "checkpoint"
    return changed_weights(reference.checkpoint, target, {TABLE: _nan_for_w})


@pytest.fixture(scope="module")
def diverged(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its attention is not a number, so its contacts are not either."""
    name = "encoder.layers.self_attention.linear_qkv.weight"
    target = tmp_path_factory.mktemp("diverged") / "checkpoint"
    return changed_weights(reference.checkpoint, target, {name: _infinite})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_fasta(folder / "x.fasta", PROTEINS)
    write_fasta(folder / "wild.fasta", [("wild", "MKTAYIAKQR")])
    (folder / "v.csv").write_text("mutant\nK2A\nT3W\n")
    (folder / "s.csv").write_text("mutated_sequence\nMKTAYIAKQR\nMKTWAYIAKQ\n")
    (folder / "gym.csv").write_text(
        "DMS_id,DMS_filename,UniProt_ID,target_seq,coarse_selection_type\na,a.csv,P,MKTAYIAKQR,Activity\n"
    )
    (folder / "assays").mkdir()
    (folder / "assays" / "a.csv").write_text("mutant,DMS_score\nK2A,1\nT3W,2\n")
    return folder


EMBED = ("embed", "CKPT", "x.fasta", "--out")
SCORE = ("score", "CKPT", "--fasta", "wild.fasta", "--variants")

COMMANDS: dict[str, tuple[Sequence[str], str]] = {
    "residue": ((*EMBED, "OUT.h5"), "bad: residue/layer_4"),
    "pooled": ((*EMBED, "OUT.npz", "--include", "pooled"), "bad: pooled/layer_4"),
    "cls": ((*EMBED, "OUT", "--include", "pooled", "--pooling", "cls"), "bad: pooled/layer_4"),
    "bionemo": ((*EMBED, "OUT.h5", "--layout", "bionemo"), "bad: residue/layer_4"),
    "logits": ((*EMBED, "OUT.h5", "--include", "logits"), "(clean|bad|worse): logits"),
    "parquet": ((*EMBED, "OUT.parquet"), "bad: residue/layer_4"),
    "wt-marginals": ((*SCORE, "v.csv", "--strategy", "wt-marginals", "--out", "OUT.csv"), "wild: the"),
    "masked-marginals": ((*SCORE, "v.csv", "--out", "OUT.csv"), "wild: the distribution at its residue 2"),
    "pseudo-ppl": (
        (*SCORE, "v.csv", "--strategy", "pseudo-ppl", "--out", "OUT.csv"),
        "wild, variant 'MATAYIAKQR': the distribution at its residue 1",
    ),
    "whole": (("score", "CKPT", "--variants", "s.csv", "--out", "OUT.csv"), "s.csv:2: the distribution"),
    "scan": (("score", "CKPT", "--fasta", "wild.fasta", "--out", "OUT.csv"), "wild: the distribution"),
    "proteingym": (
        ("score", "CKPT", "--proteingym", "gym.csv", "--assays", "assays", "--out", "OUT"),
        "a: the distribution",
    ),
    "evaluate": (("evaluate", "CKPT", "--data", "x.fasta", "--out", "OUT.json"), "(clean|bad|worse): the"),
    "compare": (
        ("compare", "CKPT", "GOOD", "--data", "x.fasta", "--out", "OUT.json"),
        "(clean|bad|worse): the distribution",
    ),
}


@pytest.mark.some(6)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_nan_in_a_weight_ends_every_command(
    reference: Reference,
    damaged: Path,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    command, said = COMMANDS[name]
    if name == "parquet":
        pytest.importorskip("pyarrow")
    known = {"CKPT": str(damaged), "GOOD": str(reference.checkpoint)}
    words = [
        str(tmp_path / word)
        if word.startswith("OUT")
        else str(path)
        if path.exists()
        else known.get(word, word)
        for word in command
        for path in [inputs / word]
    ]
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    cure = f"`esm2mega inspect {damaged}` counts and names the weights that are damaged or diverged"
    line = f"{said}.* has values that are not finite .*, which are not written; {re.escape(cure)}"
    assert re.search(line, errors.splitlines()[-1]), errors
    # What --resume would go on with may stay; a summary, table or file of results does not.
    left = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parts[0] for path in left} <= {"OUT.h5.partial", "OUT.npz.partial", "OUT.partial"} | {
        *("OUT.parquet.partial", "OUT")
    }
    assert [path.name for path in left if path.parts[0] == "OUT"] in ([], ["settings.json"])
    assert not list(tmp_path.rglob("done.*")), "no piece counts as finished"


@pytest.mark.parametrize("name", ["evaluate", "compare", "whole"])
def test_finite_outputs_with_an_infinite_perplexity_are_refused(
    reference: Reference, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """One bias of 1e4: every logit is a number, and the loss of the other tokens is some 10,000 nats."""

    def raise_a(bias: torch.Tensor) -> None:
        bias[VOCAB.index("A")] = 1e4

    large = changed_weights(reference.checkpoint, tmp_path / "large", {"output_layer.bias": raise_a})
    places = {"CKPT": str(large), "GOOD": str(reference.checkpoint)}
    command = [places.get(word, word) for word in COMMANDS[name][0]]
    out = next(tmp_path / word for word in command if word.startswith("OUT"))
    named = [str(inputs / word) if (inputs / word).exists() else word for word in command]
    assert main([str(out) if word.startswith("OUT") else word for word in named]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r": a loss of [\d.e+]+ nats has no finite perplexity, so nothing is written; ", error)
    assert not out.exists()


def test_contacts_and_other_infinities(
    diverged: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.h5"
    assert (
        main(["embed", str(diverged), str(inputs / "x.fasta"), "--out", str(out), "--include", "contacts"])
        == 2
    )
    assert ": contacts has values that are not finite" in capsys.readouterr().err
    assert not out.exists()


def test_finished_pieces_stay_and_the_bad_one_is_not_among_them(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The protein that fails is in the last of several pieces."""
    rng = np.random.default_rng(1)
    letters = list(LETTERS.replace("W", ""))
    proteins = [(f"p{i}", "".join(rng.choice(letters, size=120))) for i in range(80)] + [("bad", "MW")]
    fasta = write_fasta(tmp_path / "x.fasta", proteins)
    command = ["embed", str(damaged), str(fasta), "--out", str(tmp_path / "x.npz"), "--include", "pooled"]
    for mode in ([], ["--resume"]):
        assert main([*command, *mode]) == 2
        assert "bad: pooled/layer_4 has values" in capsys.readouterr().err
    lines = (tmp_path / "x.npz.partial" / "done.0").read_text().split("\n")
    pieces = {json.loads(line.rpartition(" ")[0])[0] for line in lines if line}
    assert pieces == {0, 1} and not (tmp_path / "x.npz").exists()


def test_from_python(reference: Reference, damaged: Path, diverged: Path) -> None:
    with esm2mega.load(damaged) as model:
        for call in (model.embed, model.logits, lambda x: model.embed(x, pooling="mean")):
            with pytest.raises(UserError, match=r"sequences\[[01]\]: .* not finite"):
                call(["MKT", "MW"])
        assert np.isfinite(model.embed(["MKT"])[0]).all()
        for strategy in ("wt-marginals", "masked-marginals", "pseudo-ppl"):
            with pytest.raises(UserError, match="'MKTAY'.*: the distribution at its residue"):
                model.score("MKTAY", ["K2A"], strategy)
    with esm2mega.load(diverged) as model, pytest.raises(UserError, match=r"sequences\[0\]: contacts has"):
        model.contacts(["MKTAYIA"])


def test_inspect_counts_them(
    reference: Reference, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(damaged)]) == 0
    found = capsys.readouterr().out
    assert f"1 values in 1 of 23 tensors are not finite: {TABLE} (1 NaN, 0 infinite, of 1,920)" in found
    assert main(["inspect", str(reference.checkpoint)]) == 0
    assert "tensors are finite" in capsys.readouterr().out
    for target, form in (("hf", "hf"), ("own", "esm2mega")):
        assert main(["convert", str(damaged), str(tmp_path / target), "--to", form]) == 0
        (kept,) = (x for x in capsys.readouterr().out.splitlines() if "not finite" in x)
        assert kept.startswith("kept:    ") and TABLE in kept
        assert main(["inspect", str(tmp_path / target)]) == 0
        assert f"are not finite: {TABLE} (1 NaN" in capsys.readouterr().out
    assert main(["convert", str(damaged), str(tmp_path / "v"), "--to", "esm2mega", "--verify"]) == 1
    assert "verification failed: the models give values that are not finite" in capsys.readouterr().err


def test_no_conversion_makes_infinities(
    reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def large(weight: torch.Tensor) -> None:
        weight[1, 2] = 1e5

    source = changed_weights(reference.checkpoint, tmp_path / "large", {TABLE: large})
    command = ["convert", str(source), str(tmp_path / "hf"), "--to", "hf", "--dtype"]
    assert main([*command, "fp16"]) == 2
    said = capsys.readouterr().err
    assert f"{TABLE}: has values beyond 65504, the largest of float16; give --dtype bf16 or fp32" in said
    assert not (tmp_path / "hf").exists()
    assert main([*command, "bf16"]) == 0


def test_a_stored_dtype_that_is_too_small(reference: Reference, tmp_path: Path) -> None:
    """A finite state that only rounding makes infinite."""
    from esm2mega.config.schema import InferConfig, ModelConfig
    from esm2mega.data.store.token_store import TokenStore
    from esm2mega.infer.embeddings import Embeddings
    from esm2mega.infer.proteins import Lengths

    prepare_fasta([write_fasta(tmp_path / "x.fasta", [("p", "MK")])], tmp_path / "s")
    model = ModelConfig(num_layers=1, hidden_size=4, ffn_hidden_size=4, num_attention_heads=1)
    for dtype, value in (("fp16", 7e4), ("bf16", 3.4e38), ("fp32", 1e39)):
        infer = InferConfig(dtype=dtype, outputs=["pooled"])
        contents = Embeddings(TokenStore(tmp_path / "s" / "train"), {}, infer, model, Lengths(9, "error", 2))
        values = {"pooled/layer_1": torch.full((4,), value, dtype=torch.float64)}
        with pytest.raises(
            UserError, match=f"p: pooled/layer_1 has values beyond .* the largest of {dtype}; "
        ):
            list(contents.stored(0, values))
