"""Keys, options and files of other systems are answered with what does the same here, ours never."""

from __future__ import annotations

from pathlib import Path

import pytest

from esm2mega.cli.app import main
from esm2mega.config.foreign.systems import TABLES
from esm2mega.config.keys import known_keys
from esm2mega.config.load import conf_dir, load_run
from esm2mega.errors import UserError
from tests.foreign_configs import FILES, write_all


def error_of(*overrides: str, config: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_run(config, ["model.size=tiny", *overrides])
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("trainer.max_steps=100", "one of BioNeMo 1: write train.max_steps=100"),
        ("++trainer.max_steps=100", "one of BioNeMo 1: write train.max_steps=100"),
        ("runconfig.max_steps=5", "one of Cerebras Model Zoo: write train.max_steps=5"),
        ("trainer.init.loop.max_steps=5", "one of Cerebras Model Zoo: write train.max_steps=5"),
        ("train_input.data_dir=x", "one of Cerebras Model Zoo: here data.train"),
        ("model.seq_length=512", "one of BioNeMo 1: write data.max_seq_length=512"),
        ("model_name=facebook/esm2_t6_8M_UR50D", "one of ESM2-FA: write model.size=8M"),
        ("model.model_name=my/model", "one of ESM2-FA: write model.from=my/model"),
        ("num_steps=7", "one of BioNeMo 2: write train.max_steps=7"),
        ("learning_rate=1e-4", "one of Hugging Face Trainer and ProteinLM: write optim.lr=0.0001"),
        ("trainer.devices=2", "one of BioNeMo 1: done elsewhere: `torchrun --nproc-per-node`"),
        ("trainer.benchmark=true", "one of BioNeMo 1: no key is needed"),
        ("runconfig.num_act_servers=1", "one of Cerebras Model Zoo: there is nothing like it here"),
        ("model.num_heads=3", "one of Cerebras Model Zoo: write model.num_attention_heads=3"),
        ("trainer.precision=tf32", "one of BioNeMo 1: here model.precision: tf32 is none of"),
    ],
)
def test_their_key_is_answered_with_ours(word: str, answer: str) -> None:
    assert f", which is {answer}" in error_of(word)


def test_a_name_that_a_key_of_ours_ends_with_means_that_key() -> None:
    assert error_of("max_steps=3").endswith("the nearest valid key is train.max_steps")
    assert error_of("micro_batch_size=3").endswith("the nearest valid key is train.micro_batch_size")


@pytest.mark.parametrize("key", ["train.max_step", "optim.lrs", "trian.max_steps", "nonsense", "model.sise"])
def test_a_mistake_of_ours_still_gets_the_nearest_key(key: str) -> None:
    assert "; the nearest valid key is " in error_of(f"{key}=3")


@pytest.mark.parametrize("path", sorted(conf_dir().rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_file_of_ours_is_taken_for_one_of_theirs(path: Path, tmp_path: Path) -> None:
    """With a mistake in it, since a file without one is not even looked at."""
    file = tmp_path / "mine.yaml"
    file.write_text(path.read_text() + "trian: {max_steps: 3}\n")
    assert "unknown key trian; the nearest valid key is " in error_of(config=str(file))


def test_their_section_in_a_file_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 1\noptim: {lr: 1}\ntrain: {max_steps: 4}\ntrainer:\n  max_epochs: 5\n")
    message = error_of(config=str(file))
    assert message == (
        f"{file}:4: unknown key trainer, which is one of BioNeMo 1: write train.max_epochs=5 "
        "(instead of `train.max_steps`)"
    )


@pytest.mark.parametrize("name", FILES)
def test_their_file_is_answered_with_the_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_all(tmp_path) / name
    assert main(["pretrain", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}: is a configuration of " in error
    assert f"`esm2mega translate {path} --out OURS.yaml`" in error


@pytest.mark.parametrize(
    ("command", "option", "answer"),
    [
        ("pretrain", "--num-steps", "one of BioNeMo 2: here train.max_steps"),
        ("pretrain", "--train-iters", "one of ProteinLM: here train.max_steps"),
        (
            "finetune",
            "--num_train_epochs",
            "one of Hugging Face Trainer and ProteinLM: here train.max_epochs",
        ),
        ("finetune", "--encoder-frozen", "one of BioNeMo 2: here finetune.mode"),
    ],
)
def test_their_option_is_answered(
    command: str, option: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, option, "5"]) == 2
    assert capsys.readouterr().err.startswith(f"esm2mega: error: No such option {option}, which is {answer}")


def test_an_option_of_nobody_is_answered_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--nonsense"]) == 2
    assert "No such option" in capsys.readouterr().err
    assert main(["inspect", "x", "--num-steps", "5"]) == 2  # has no keys
    assert "No such option" in capsys.readouterr().err


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title[:20])
def test_every_key_of_a_table_has_an_answer_that_names_keys_of_ours(table) -> None:
    from esm2mega.config.foreign.answers import answer

    for rule in table.rules:
        for theirs in rule.theirs:
            name = table.written(theirs).replace("*", "x")
            if name in known_keys():
                continue
            given = answer(name)
            assert given is not None and table.system in given, name
