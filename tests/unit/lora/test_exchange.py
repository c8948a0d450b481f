"""Merging, and the exchange with Hugging Face PEFT, against each other and against `peft` itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esm2mega.checkpoint import layout
from esm2mega.config.schema import LoRAConfig
from esm2mega.convert.formats.registry import open_weights
from esm2mega.errors import UserError
from esm2mega.lora.hf_peft import export_adapters, import_adapters
from esm2mega.lora.merge import merge
from tests.unit.lora import adapted
from tests.unit.lora.adapted import KINDS, Base

FP64 = 1e-10
FP32 = 1e-5
"""Of the difference over the largest logit: rounding of another order of sums."""


@pytest.fixture(scope="module")
def base32(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return adapted.make_base(tmp_path_factory.mktemp("base") / "fp32", torch.float32)


@pytest.fixture(scope="module")
def base64(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return adapted.make_base(tmp_path_factory.mktemp("base") / "fp64", torch.float64)


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(base64: Base, kind: str, tmp_path: Path) -> None:
    checkpoint = adapted.make_adapters(tmp_path / "adapters", base64, KINDS[kind], torch.float64)
    (line,) = merge(checkpoint, tmp_path / "merged")
    unmerged, merged = adapted.logits(checkpoint), adapted.logits(tmp_path / "merged")
    plain = adapted.their_logits(base64.model)
    assert "float64" in line
    assert _distance(merged, unmerged) < FP64
    assert _distance(unmerged, plain) > 0.05, "the adapters do nothing"
    assert layout.read_config(tmp_path / "merged").lora.rank is None


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", KINDS)
def test_exported_adapter_gives_the_same_logits_in_peft(base32: Base, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import EsmForMaskedLM

    checkpoint = adapted.make_adapters(tmp_path / "adapters", base32, KINDS[kind], torch.float32)
    export_adapters(checkpoint, tmp_path / "peft")
    model = PeftModel.from_pretrained(EsmForMaskedLM.from_pretrained(base32.path), tmp_path / "peft")
    ours = adapted.logits(checkpoint)
    assert _distance(ours, adapted.their_logits(model)) < FP32
    assert _distance(ours, adapted.their_logits(base32.model)) > 0.05
    # And back: the same tensors.
    import_adapters(tmp_path / "peft", str(base32.path), tmp_path / "back")
    assert torch.equal(adapted.logits(tmp_path / "back"), ours)


def _peft_model(base: Base, lora: LoRAConfig, targets: list[str] | str, **settings: Any) -> Any:
    """A PEFT model with random values in every factor, and in the biases that are trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import EsmForMaskedLM, EsmModel

    kind = EsmModel if settings.get("task_type") == "FEATURE_EXTRACTION" else EsmForMaskedLM
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=targets,
        **settings,
    )
    model = get_peft_model(kind.from_pretrained(base.path), config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The loss of a model with a head has no gradient for these.
            if parameter.requires_grad and "contact_head" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise.abs() + 0.5 if parameter.dim() == 1 else noise * 0.1)
    return model


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", ["plain", "rslora", "dora", "some", "head"])
def test_adapter_and_gradients_of_peft(base32: Base, kind: str, tmp_path: Path) -> None:
    """What peft saved gives the same logits here; so do its gradients of every factor."""
    lora = KINDS[kind]
    # As a list "output.dense" means both linears that end so; a text is a regular expression.
    targets: Any = ["query", "key", "value", "output.dense", "intermediate.dense"]
    if kind == "some":
        targets = r".*layer\.[01]\.(attention\.self\.value|output\.dense)"
    if kind == "head":
        targets = ["query", "key", "value", "dense"]
    model = _peft_model(base32, lora, targets)
    model.save_pretrained(tmp_path / "peft")
    import_adapters(tmp_path / "peft", str(base32.path), tmp_path / "adapters")
    assert _distance(adapted.logits(tmp_path / "adapters"), adapted.their_logits(model)) < FP32

    ids, mask = adapted.batch()
    weights = torch.randn(*ids.shape, 33, generator=torch.Generator().manual_seed(2)) * mask.unsqueeze(-1)
    model.eval()
    (model(ids, attention_mask=mask).logits * weights).sum().backward()
    theirs = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # ….lora_A.default.weight
            stem, factor = name.removesuffix(".weight").removesuffix(".default").rsplit(".", 1)
            theirs[f"{stem}.{factor.replace('lora_magnitude_vector', 'magnitude')}"] = parameter.grad
    ours = adapted.gradients(tmp_path / "adapters", weights)
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name, gradient in ours.items():
        # fp32 sums over some hundred tokens of either sign
        assert _distance(gradient, theirs[name]) < 1e-4, name


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (["query", "key", "value", "dense"], {}),
    "all-linear": ("all-linear", {"bias": "all"}),
    "lora_only": (["query", "dense"], {"bias": "lora_only"}),
    "patterns": (
        ["query", "value", "dense"],
        {
            "rank_pattern": {"query": 5, r".*layer\.[02]\.output.dense": 1, "lm_head.dense": 2},
            "alpha_pattern": {"value": 9, "layer.1.attention.self.query": 4, "^lm_head.dense": 7},
        },
    ),
    "features": (["query", "dense"], {"task_type": "FEATURE_EXTRACTION", "bias": "lora_only"}),
}
"""What public code makes of ESM-2: target modules and further settings of peft."""


_QUICK = {("dense", "plain"), ("all-linear", "dora"), ("lora_only", "dora"), ("patterns", "rslora")}
_QUICK |= {("features", "plain")}


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("form", "kind"),
    [
        pytest.param(form, kind, marks=[] if (form, kind) in _QUICK else pytest.mark.slow)
        for form in FORMS
        for kind in ("plain", "rslora", "dora")
    ],
)
def test_what_public_code_makes(base32: Base, form: str, kind: str, tmp_path: Path) -> None:
    """Adapters and biases of peft: the same here, merged, and again in peft."""
    from peft import PeftModel
    from transformers import EsmForMaskedLM, EsmModel

    (targets, settings), is_bare = FORMS[form], form == "features"
    model = _peft_model(base32, KINDS[kind], targets, **settings)
    # Half of them in the file that peft wrote before version 0.6.
    model.save_pretrained(tmp_path / "peft", safe_serialization=kind != "plain")
    if kind == "plain":
        assert (tmp_path / "peft" / "adapter_model.bin").is_file()
    report = import_adapters(tmp_path / "peft", str(base32.path), tmp_path / "adapters")
    merge(tmp_path / "adapters", tmp_path / "merged")
    export_adapters(tmp_path / "adapters", tmp_path / "again", bare=is_bare)
    kind_of = EsmModel if is_bare else EsmForMaskedLM
    again = PeftModel.from_pretrained(kind_of.from_pretrained(base32.path), tmp_path / "again")
    ours = [adapted.logits(tmp_path / name) for name in ("adapters", "merged")]
    if is_bare:
        # The head is that of the base, on hidden states of either model.
        head = EsmForMaskedLM.from_pretrained(base32.path).eval().lm_head
        expected = adapted.their_logits(model, head)
        assert _distance(adapted.their_logits(again, head), expected) < FP32
        assert any(line.startswith("dropped: base_model.model.pooler.dense.lora_A") for line in report)
    else:
        expected = adapted.their_logits(model)
        assert _distance(adapted.their_logits(again), expected) < FP32
    assert [_distance(logits, expected) < FP32 for logits in ours] == [True, True]
    plain = adapted.their_logits(base32.model)
    assert _distance(expected, plain) > 0.05, "the adapters do nothing"
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["bias"] == settings.get("bias", "none")
    before, after = (load_peft(tmp_path / name) for name in ("peft", "again"))
    left_out = {name for name in before if "pooler" in name or "contact_head" in name}
    # The key of a model of ours is trained with q and v, so that its bias is there too.
    assert before.keys() - left_out <= after.keys()
    ranks = {name: len(value) for name, value in before.items() if "lora_A" in name and name not in left_out}
    assert ranks == {name: len(value) for name, value in after.items() if "lora_A" in name}


def load_peft(folder: Path) -> dict[str, torch.Tensor]:
    old = folder / "adapter_model.bin"
    return (
        torch.load(old, weights_only=True)
        if old.exists()
        else load_file(folder / "adapter_model.safetensors")
    )


def test_trained_biases_that_the_file_does_not_hold(base32: Base, tmp_path: Path) -> None:
    """Versions of peft train biases with ``lora_only``, and save none of them."""
    _peft_model(base32, KINDS["plain"], ["query"], bias="lora_only").save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "bias" not in name}, file)
    report = import_adapters(tmp_path / "peft", str(base32.path), tmp_path / "out")
    none = f"biases   {tmp_path / 'peft'} holds none, though bias=lora_only trains some: those of the base"
    assert [line for line in report if line.startswith(none)], report


def test_adapters_without_a_place_here(base32: Base, tmp_path: Path) -> None:
    """Of the contact head: left out while they do nothing, else refused; of a head that is missing."""
    from transformers import EsmModel

    model = _peft_model(base32, KINDS["plain"], "all-linear")
    model.save_pretrained(tmp_path / "peft")
    lines = import_adapters(tmp_path / "peft", str(base32.path), tmp_path / "out")
    stem = "dropped: base_model.model.esm.contact_head.regression.lora_"
    why = ".weight, of the contact head, which does nothing, since its B is zero"
    assert [line for line in lines if line.startswith("dropped")] == [f"{stem}A{why}", f"{stem}B{why}"]
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    name = next(name for name in tensors if "contact_head" in name and "lora_B" in name)
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="contact_head.regression.lora_A.weight is not an adapter of a lin"):
        import_adapters(tmp_path / "peft", str(base32.path), tmp_path / "out2")
    EsmModel.from_pretrained(base32.path).save_pretrained(tmp_path / "bare")
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="adapts lm_head.dense, but there is no head of a language model"):
        import_adapters(tmp_path / "whole", str(tmp_path / "bare"), tmp_path / "out3")


@pytest.fixture(scope="module")
def saved(base32: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "peft"
    _peft_model(base32, KINDS["plain"], ["query", "value"]).save_pretrained(folder)
    return folder


@pytest.fixture
def source(saved: Path, tmp_path: Path) -> Path:
    """Adapters that peft saved, to be changed."""
    return shutil.copytree(saved, tmp_path / "peft")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "some"),
        ("rank_pattern", {"query": 0}),
        ("rank_pattern", {"query": 2.0}),
        ("rank_pattern", ["query"]),
        ("alpha_pattern", {"(a+)+": 2}),
        ("alpha_pattern", {".*.*.*.*": 2}),
        ("alpha_pattern", {"[z-a]": 2}),
        ("init_lora_weights", "pissa"),
        ("fan_in_fan_out", True),
        ("r", 0),
        ("r", "4"),
        ("peft_type", "IA3"),
        ("use_rslora", "maybe"),
        ("use_rslora", 2),
        ("use_dora", [False]),
        ("fan_in_fan_out", "True"),
        ("lora_dropout", "much"),
        ("lora_dropout", [0.1]),
    ],
)
def test_what_would_change_the_adapter_is_refused(
    base32: Base, source: Path, tmp_path: Path, key: str, value: Any
) -> None:
    path = source / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=key):
        import_adapters(source, str(base32.path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [("False", False), ("false", False), ("0", False), (0, False), (None, False)]
    + [("True", True), ("1", True), (1, True)],
)
def test_truth_values_count_for_what_their_text_says(
    base32: Base, source: Path, tmp_path: Path, text: Any, value: bool
) -> None:
    path = source / "adapter_config.json"
    changed = {"use_rslora": text, "use_dora": "False", "fan_in_fan_out": "False", "lora_dropout": "0.25"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    import_adapters(source, str(base32.path), tmp_path / "out")
    lora = layout.read_config(tmp_path / "out").lora
    assert (lora.use_rslora, lora.use_dora, lora.dropout) == (value, False, 0.25)


def test_tensors_without_a_place_are_refused_or_reported(base32: Base, source: Path, tmp_path: Path) -> None:
    path = source / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.classifier.dense.weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match="classifier.dense.weight is not an adapter"):
        import_adapters(source, str(base32.path), tmp_path / "out")
    lines = import_adapters(source, str(base32.path), tmp_path / "out", ["*classifier*"])
    assert lines[1:] == ["dropped: base_model.model.classifier.dense.weight"]

    some = next(iter(tensors))
    save_file({name: value for name, value in tensors.items() if name != some}, path)
    with pytest.raises(UserError, match="not whole"):
        import_adapters(source, str(base32.path), tmp_path / "out2")
    save_file({**tensors, some: tensors[some][:, :-1].contiguous()}, path)
    with pytest.raises(UserError, match="has shape"):
        import_adapters(source, str(base32.path), tmp_path / "out2")


def test_another_base_is_refused(base32: Base, base64: Base, tmp_path: Path) -> None:
    """Also for weights that differ in one number, and for adapters where a whole model is wanted."""
    checkpoint = adapted.make_adapters(tmp_path / "adapters", base32, KINDS["plain"], torch.float32)
    with pytest.raises(UserError, match="other weights"):
        merge(checkpoint, tmp_path / "merged", str(base64.path))
    with pytest.raises(UserError, match="lora merge"):
        open_weights(checkpoint)
    moved = base32.path.rename(base32.path.with_name("moved"))
    try:
        with pytest.raises(UserError, match="not there any more"):
            adapted.logits(checkpoint)
        run = layout.read_config(checkpoint)
        run.init_from = str(moved)
        adapted.logits(checkpoint, run)
        with (moved / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))
        with pytest.raises(UserError, match="other weights"):
            adapted.logits(checkpoint, run)
    finally:
        with (moved / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(last)
        moved.rename(base32.path)
