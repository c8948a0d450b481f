"""Every file of another system becomes a configuration that loads and trains as that system did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esm2mega.cli.app import main
from esm2mega.config.foreign.systems import TABLES
from esm2mega.config.foreign.translate import as_yaml, translate, translate_file
from esm2mega.config.keys import known_keys
from esm2mega.config.load import load_run, load_run_over
from esm2mega.config.schema import Run, flatten
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate
from esm2mega.errors import UserError
from tests.foreign import HF_CONFIG
from tests.foreign_configs import FILES, write_all

FINETUNE = {"flip_scl.yaml", "flip_lora.yaml", "finetune_esm2.sh", "params_classifier.yaml", "tape_train.sh"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIONEMO_HOME", "/leaked")
    return write_all(tmp_path)


def loaded(path: Path) -> Run:
    """The translated file as `pretrain --config` or `finetune --config` loads it, the latter with a model."""
    needs_model = "model:\n  size" not in path.read_text() and "num_layers" not in path.read_text()
    base = load_run(None, ["model.size=15B"])
    return load_run_over(base, (), str(path)) if needs_model else load_run(str(path))


@pytest.mark.parametrize("name", FILES)
def test_every_translated_file_loads_and_is_valid(name: str, folder: Path) -> None:
    lines = translate_file(name, "ours.yaml")
    run = loaded(folder / "ours.yaml")
    assert (run.task.kind is not None) == (name in FINETUNE)
    layout = run.parallel.tensor_model_parallel_size * run.parallel.pipeline_model_parallel_size
    validate(run, layout)
    if name in FINETUNE:
        validate_task(run)
    assert not [line for line in lines if line.startswith("to correct")]
    settings = translate(folder / name).settings
    values = flatten(run)
    assert {key: values[key] for key in settings} == settings
    assert all("\n" not in line for line in lines)


SETTINGS: dict[str, dict[str, Any]] = {
    "base_config.yaml": {
        "model.size": "8M",
        "run_dir": "results/esm2nv",
        "data.train": "uniref/train",
        "data.valid": "uniref/valid",
        "data.crop": "start",
        "data.mlm_probability": 0.2,
        "data.mask_fraction": 0.7,
        "data.random_fraction": 0.2,
        "train.micro_batch_size": 2,
        "train.accumulate_grad_batches": 4,
        "train.eval_every": 700,
        "checkpoint.save_every": 700,
        "checkpoint.keep_best": 3,
        "optim.weight_decay": 0.02,
        "optim.clip_grad": 0.5,
        "schedule.decay_steps": 9020,
        "logging.wandb_project": "esm2nv_pretraining",
        "seed": 77,
    },
    "flip_scl.yaml": {
        "init_from": "models/650M.nemo",
        "data.train": "flip/scl/train/x000.csv",
        "data.valid": "flip/scl/val/x000.csv",
        "train.max_epochs": 20,
        "train.eval_every": 25,  # not that of the file in defaults
        "optim.lr": 0.0005,
        "optim.betas": [0.9, 0.999],
        "schedule.min_lr_ratio": 0.02,
        "task.kind": "classification",
        "task.num_classes": 10,
        "task.hidden_size": 128,
        "finetune.mode": "frozen",
    },
    "flip_lora.yaml": {
        "task.kind": "token_classification",
        "task.mask_column": "resolved",
        "task.head": "cnn",
        "finetune.mode": "lora",
        "lora.rank": 8,
        "lora.target_modules": [f"encoder.layers.{n}.self_attention.linear_qkv" for n in (0, 5)],
        "schedule.name": "constant",
        "train.micro_batch_size": 2,  # a default of that system
    },
    "train_esm2.sh": {
        "model.size": "35M",
        "model.activation": "gelu_tanh",
        "model.precision": "bf16",
        "data.random_residues": "amino_acids",
        "train.max_steps": 4000,
        "schedule.decay_steps": 4510,  # of 5,000 steps
        "train.micro_batch_size": 16,
        "train.accumulate_grad_batches": 2,
        "train.eval_every": 10000,
        "run_dir": "results/mine",
    },
    "finetune_esm2.sh": {
        "task.kind": "token_classification",
        "task.num_classes": 3,
        "task.target_columns": ["resolved_labels"],
        "task.hidden_size": 32,
        "lora.rank": 32,
        "lora.alpha": 32,
        "finetune.lr_scale": {"head.*": 10.0},
        "train.max_steps": 50,
        "data.max_seq_length": 512,
    },
    "recipe.json": {
        "model.size": "8M",
        "model.hidden_dropout": 0.02,
        "model.activation": "gelu_tanh",
        "parallel.pipeline_model_parallel_size": 2,
        "train.accumulate_grad_batches": 3,
        "checkpoint.save_every": 50,
    },
    "native_te.yaml": {
        "model.size": "8M",
        "train.max_steps": 2000,
        "schedule.decay_steps": 900,
        "run_dir": "ckpt/version_{version}",
        "checkpoint.resume": "never",
    },
    "params_classifier.yaml": {
        "init_from": "esm2.mdl",
        "train.global_batch_size": 432,
        "train.micro_batch_size": 54,
        "data.max_seq_length": 1026,
        "task.head": "pooler",
        "task.pooler_activation": "gelu",
        "task.dropout": 0.4,
        "optim.lr": 1e-5,
        "schedule.warmup_steps": 500,
        "schedule.decay_steps": 5000,
        "finetune.strict": False,
    },
    "params_trainer.yaml": {
        "model.size": "35M",
        "schedule.decay_steps": 452_000,
        "train.global_batch_size": 2048,
    },
    "esm2fa.yaml": {
        "model.size": "150M",
        "model.precision": "fp16",
        "model.attention_backend": "sdpa",
        "data.crop": "chunk",
        "train.micro_batch_tokens": 8192,
        "train.global_batch_tokens": 8192 * 32,
        "train.early_stopping.patience": 3,
        "optim.betas": [0.9, 0.95],
        "schedule.name": "cosine_plateau",
        "schedule.decay_steps": 1000,
    },
    "trainer.yaml": {"schedule.warmup_steps": 60, "schedule.decay_steps": 1000, "optim.betas": [0.9, 0.98]},
    "pretrain_tape.sh": {
        "run_dir": "checkpoints",
        "model.family": "proteinbert_preln",
        "model.ffn_hidden_size": 4096,
        "model.max_positions": 2176,
        "model.activation": "gelu_tanh",
        "model.recompute": "full",
        "model.hidden_dropout": 0.1,
        "data.train": "pfam/train",
        "train.micro_batch_tokens": 4 * 2176,
        "train.eval_batches": 10,
        "optim.betas": [0.9, 0.999],
        "schedule.warmup_steps": 9900,
        "schedule.min_lr_ratio": 0.1,
    },
    "tape_train.sh": {
        "run_dir": "results/remote_homology_transformer_{time}",
        "checkpoint.resume": "never",
        "task.kind": "classification",
        "task.num_classes": 1195,
        "data.train": "tape/remote_homology/train.csv",
        "train.global_batch_size": 64,
        "train.max_epochs": 20,
        "optim.clip_grad": 1.0,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, folder: Path) -> None:
    settings = translate(folder / name).settings
    assert {key: settings.get(key) for key in SETTINGS[name]} == SETTINGS[name]


def ours(run: Run) -> Callable[[int], float]:
    """The learning rate of a step as `conf/base.yaml` describes `schedule.name=linear`."""
    warm, end, low = run.schedule.warmup_steps, run.schedule.decay_steps, run.schedule.min_lr_ratio
    assert run.schedule.name == "linear" and end is not None

    def rate(step: int) -> float:
        if step < warm:
            return run.optim.lr * step / warm
        return run.optim.lr * max(low, 1 - (1 - low) * (step - warm) / (end - warm))

    return rate


@pytest.mark.parametrize(
    ("name", "steps"), [("base_config.yaml", 10_000), ("train_esm2.sh", 5000), ("recipe.json", 1000)]
)
def test_the_schedule_of_bionemo_is_kept(name: str, steps: int, folder: Path) -> None:
    """After the warmup p (1 - (s - w) / (N - w)), at least a tenth of p, at every step s."""
    translate_file(name, "ours.yaml")
    run = load_run("ours.yaml")
    warm, peak = run.schedule.warmup_steps, run.optim.lr
    for step in range(warm, steps, 7):
        theirs = max(peak * (1 - (step - warm) / (steps - warm)), 0.1 * peak)
        # decay_steps is a whole step, so the line may be off by one step of N.
        assert ours(run)(step) == pytest.approx(theirs, abs=peak / (steps - warm))


def test_the_schedule_of_cerebras_is_kept(folder: Path) -> None:
    translate_file("params_trainer.yaml", "ours.yaml")
    rate = ours(load_run("ours.yaml"))
    for step, theirs in [(0, 0.0), (1000, 2e-4), (2000, 4e-4), (227_000, 2.2e-4), (452_000, 4e-5)]:
        assert rate(step) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("train_esm2.sh", "  train_esm2.sh:15: --limit-val-batches=2: counts batches of proteins"),
        ("train_esm2.sh", "  train_esm2.sh:17: --nsys-profiling=true: profiles are taken with nsys itself"),
        ("train_esm2.sh", "  --weight-decay: is heeded here; there it was ignored, and 0.01 used"),
        ("native_te.yaml", "  native_te.yaml:14: fp8_config.enabled=true: "),
        ("native_te.yaml", "  native_te.yaml:12: wandb_init_args.name=???: must be given; set logging."),
        (
            "params_classifier.yaml",
            "  optimizer.learning_rate: pieces after the second are left out; after step 5000",
        ),
        ("params_trainer.yaml", "still to give: data.train, data.valid"),
        (
            "pretrain_tape.sh",
            "  pretrain_tape.sh:14: --global-batch-size=$(($MICRO_BATCH_SIZE*$WORLD_SIZE)): ",
        ),
        ("tape_train.sh", "  tape_train.sh:3: --patience=5: counts epochs"),
        ("recipe.json", "  recipe.json:29: experiment_config.metric_to_monitor_for_checkpoints="),
        ("base_config.yaml", "  base_config.yaml:6: trainer.devices=2: `torchrun --nproc-per-node`"),
        (
            "base_config.yaml",
            "  esm2mega prepare uniref --uf50 raw/uf50.fasta --uf90 raw/uf90.fasta --mapping raw/mapping.tsv "
            "--valid raw/uf50_valid.fasta --out uniref",
        ),
        (
            "base_config.yaml",
            "  torchrun --standalone --nproc-per-node 2 -m esm2mega pretrain --config ours.yaml",
        ),
        (
            "pretrain_tape.sh",
            "  esm2mega prepare fasta data/pfam_text_document --format megatron --split "
            "32593668,1715454,44311 "
            "--out pfam",
        ),
    ],
)
def test_what_is_left_is_listed(name: str, line: str, folder: Path) -> None:
    lines = translate_file(name, "ours.yaml")
    assert [found for found in lines if found.startswith(line)], lines


@pytest.mark.parametrize(
    ("option", "shares", "splits"),
    [
        ("", "969,30,1", ["train", "valid", "test"]),
        ("--split 100,0,0", "100,0,0", ["train"]),
        ("--split 9/1", "9,1,0", ["train", "valid"]),
        ("--split 0.9,0.05,0.05,7", "18,1,1", ["train", "valid", "test"]),
    ],
)
def test_stores_are_those_that_the_printed_command_makes(
    option: str, shares: str, splits: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "run.sh"
    script.write_text(f"python pretrain_tape.py --num-layers 2 --seq-length 128 --data-path pfam {option}\n")
    found = translate(script)
    assert [split for split in ("train", "valid", "test") if f"data.{split}" in found.settings] == splits
    assert f"--split {shares} " in found.commands[0]


@pytest.mark.parametrize(("given", "ours"), [("true", "auto"), ("false", None), ("out/step_5", "out/step_5")])
def test_the_trainer_resumes(given: str, ours: str | None, tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text(f"learning_rate: 1e-4\nmax_steps: 9\nresume_from_checkpoint: {given}\n")
    assert translate(file).settings.get("checkpoint.resume") == ours


@pytest.mark.parametrize(
    ("kind", "share", "problem"),
    [
        (None, 0.15, None),
        (None, 2, "data.mlm_probability=2.0"),
        ("esm", 0.15, None),
        ("esm", 2, "data.mlm_probability=2.0"),
        ("bert", 0.15, "model_type is 'bert', not 'esm'"),
    ],
)
def test_what_is_wrong_beside_a_model_of_hugging_face(
    kind: str | None, share: float, problem: str | None, tmp_path: Path
) -> None:
    """Its directory may be on another machine; all other keys are checked all the same."""
    if kind is not None:
        (tmp_path / "own").mkdir()
        (tmp_path / "own/config.json").write_text(json.dumps({**HF_CONFIG, "model_type": kind}))
    file = tmp_path / "theirs.yaml"
    file.write_text(
        f"model: {{model_name: {tmp_path / 'own'}, max_batch_size: 4096}}\n"
        f"training: {{mlm_probability: {share}, warmup_steps: 5, lr_scheduler: cosine}}\n"
    )
    lines = translate_file(str(file), str(tmp_path / "ours.yaml"))
    assert f"  from: {tmp_path / 'own'}  # model.model_name" in (tmp_path / "ours.yaml").read_text()
    found = [line for line in lines if line.startswith("to correct")]
    assert len(found) == (problem is not None) and (problem or "") in "".join(found), lines


def test_a_compressed_name_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"ours.yaml.gz: is written without compression; name it ours.yaml"):
        translate_file("esm2fa.yaml", "ours.yaml.gz")


def test_no_key_is_lost(folder: Path) -> None:
    """Each key that a file gives is translated, or listed, or said to need nothing."""
    for name in FILES:
        translation = translate(folder / name)
        said = "\n".join(
            [
                *translation.untranslated,
                *translation.elsewhere,
                *translation.needless,
                *translation.origins.values(),
            ]
        )
        for key, written in translation.foreign.written.items():
            if (
                isinstance(translation.foreign.values[key], str)
                and type(translation.foreign.values[key]) is not str
            ):
                continue  # null
            rule = translation.foreign.table.rule(key)
            sets = [ours for ours in rule.ours if ours in translation.settings] if rule else []
            assert written in said or sets, f"{name}: {written}"


HOSTILE = """\
exp_manager:
  exp_dir: "${oc.env:SECRET}/x"
  name: ${oc.env:SECRET}
trainer:
  max_steps: ${trainer.max_epochs}
  max_epochs: ${trainer.max_steps}
  precision: "$(touch owned)"
  "gradient_clip_val\\n# injected": 1
model:
  restore_encoder_path: "a\\nseed: 666\\n#"
  num_layers: 6
  tokenizer: {model_name: "\\u001b[31m"}
do_training: "\\u001b[2J"
model.data.train.custom_pretraining_fasta_path: "${run_dir}"
"""


def test_a_strangers_file_is_read_literally(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET", "leaked")
    (folder / "hostile.yaml").write_text(HOSTILE)
    assert main(["translate", "hostile.yaml", "--out", "ours.yaml"]) == 0
    printed = capsys.readouterr().out
    result = (folder / "ours.yaml").read_text()
    assert not (folder / "owned").exists()
    for text in (printed, result):
        assert "leaked" not in text and "\x1b" not in text
    assert "\nseed: 666" not in result and "\n# injected" not in result
    assert load_run("ours.yaml").init_from == "a\nseed: 666\n#"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("seed: 3\nmodel: {size: 8M}\n", "too few of its keys are theirs"),
        ("hello", "it is neither"),
        ("a: [", ""),
        ("a: &a [*a]\ntrainer: 3\n", "alias"),
        ('trainer: !!python/object/apply:os.system ["touch owned"]\n', "could not determine a constructor"),
        (f"trainer: {'[' * 200}", ""),
        (b"\xff\xfe", "not text in UTF-8"),
        ("x" * (1 << 20) + "y", "larger than 1,048,576 bytes"),
        ("#!/bin/sh\ntrain.py --nonsense 3 --other 4\n", "few options that ESM2-FA has"),
    ],
)
def test_other_files_are_refused_in_one_line(
    content: str | bytes, problem: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "other").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["translate", "other", "--out", "ours.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and problem in error and error.startswith("esm2mega: error: other: ")
    assert not (folder / "ours.yaml").exists() and not (folder / "owned").exists()


def test_a_missing_file_and_an_existing_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", "absent", "--out", "ours.yaml"]) == 2
    assert "absent: cannot be read" in capsys.readouterr().err
    assert main(["translate", "esm2fa.yaml", "--out", "trainer.yaml"]) == 2
    assert "trainer.yaml: exists" in capsys.readouterr().err


def test_files_in_defaults_are_read_beside_the_file_alone(folder: Path) -> None:
    (folder / "inner").mkdir()
    text = (
        "defaults: [../base_config, absent, base_config]\nexp_manager: {exp_dir: x}\ntrainer: {devices: 1}\n"
    )
    (folder / "inner" / "mine.yaml").write_text(text)
    notes = translate(folder / "inner" / "mine.yaml").remarks
    assert len([note for note in notes if "which is not beside it" in note]) == 3
    (folder / "circle.yaml").write_text("defaults: circle\nexp_manager: {exp_dir: x}\n")
    assert main(["translate", "circle.yaml", "--out", "ours.yaml"]) == 2


def test_where_two_keys_say_different_things_the_second_is_listed(folder: Path) -> None:
    (folder / "two.yaml").write_text(
        "model: {seq_length: 512, data: {max_seq_length: 256}}\ntrainer: {devices: 1}\n"
    )
    translation = translate(folder / "two.yaml")
    assert translation.settings["data.max_seq_length"] == 512
    assert (
        "two.yaml:1: model.data.max_seq_length=256: data.max_seq_length=512 stands"
        in translation.untranslated[0]
    )


def test_batches_are_counted_in_one_way(folder: Path) -> None:
    (folder / "batch.yaml").write_text(
        "model: {micro_batch_size: 4, global_batch_size: 64}\n"
        "trainer: {accumulate_grad_batches: 8, devices: 2}\n"
    )
    settings = translate(folder / "batch.yaml").settings
    assert (settings["train.micro_batch_size"], settings["train.global_batch_size"]) == (4, 64)
    assert "train.accumulate_grad_batches" not in settings


def test_the_result_says_what_each_key_was_made_of(folder: Path) -> None:
    text = as_yaml(translate(folder / "esm2fa.yaml"))
    assert "  lr: 0.0004  # training.learning_rate\n" in text
    assert "  early_stopping:\n    patience: 3  # training.early_stopping.patience\n" in text
    assert "  crop: chunk  # ESM2-FA: long proteins were cut into pieces of equal length\n" in text


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title[:20])
def test_tables_are_consistent(table: Any) -> None:
    """Each key stands once, names keys of ours that exist, and says why where it names none."""
    names = [name for rule in table.rules for name in rule.theirs]
    assert sorted(set(names)) == sorted(names)
    for rule in table.rules:
        assert set(rule.ours) <= known_keys().keys(), rule
        assert rule.note or rule.ours, rule
    for defaults in table.defaults.values():
        assert all(table.rule(name) is not None for name in defaults)
    assert {habit.ours for habit in table.habits} <= known_keys().keys()
