"""Files and overrides become a typed `Run`, or one line that names key, place and cure."""

import errno
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm2mega import files
from esm2mega.config.architecture import FROM
from esm2mega.config.keys import known_keys, nearest_key
from esm2mega.config.load import (
    find_config,
    load_run,
    load_run_over,
    resolve,
    resolve_max_steps,
    run_from_yaml,
)
from esm2mega.config.resolved import save_resolved
from esm2mega.config.scalars import as_word
from esm2mega.config.schema import Run, flatten
from esm2mega.errors import MachineError, UserError

SIZE = ["model.size=tiny"]


@pytest.fixture
def write(tmp_path):
    def write_file(content: str | bytes, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


def error_of(config: str | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_run(config, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_with_a_size():
    expected = Run()
    expected.model.size = "8M"
    run = load_run(None, ["model.size=8M"])
    assert run == resolve(expected)
    assert isinstance(run, Run)
    assert (run.model.num_layers, run.schedule.decay_steps) == (6, 900)


def test_file_then_overrides(write):
    config = write(
        "model: {size: tiny}\ntrain:\n  max_steps: 7\n  early_stopping: {patience: 2}\noptim: {lr: 1e-3}\n"
    )
    run = load_run(config, ["train.max_steps=9", "++optim.betas=[0.8, 0.9]", "+seed=3", "data.train=/a b"])
    assert (run.train.max_steps, run.train.early_stopping.patience, run.seed) == (9, 2, 3)
    assert (run.optim.lr, run.optim.betas, run.data.train) == (1e-3, [0.8, 0.9], "/a b")


def test_the_last_override_wins():
    assert load_run(None, ["model.size=8M", "seed=1", "seed=2"]).seed == 2


def test_defaults_are_merged_first_and_found_beside_the_file(write):
    write("model: {size: tiny}\nseed: 5\noptim: {lr: 0.1}\n", "first.yaml")
    write("seed: 6\n", "second.yaml")
    run = load_run(write("defaults: [first, second]\noptim: {lr: 0.2}\n"))
    assert (run.model.size, run.seed, run.optim.lr) == ("tiny", 6, 0.2)


def test_a_shipped_name_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_run("pretrain_esm2_8M").model.size == "8M"
    assert find_config("pretrain_esm2_8M.yaml") == find_config("pretrain_esm2_8M")


def test_a_file_wins_over_a_shipped_name(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write("model: {size: tiny}\n", "pretrain_esm2_8M.yaml")
    assert load_run("pretrain_esm2_8M.yaml").model.size == "tiny"


def test_empty_file_empty_section_and_dotted_key(write):
    config = write("train:\n  # max_steps: 1\nmodel.size: tiny\n")
    assert load_run(config) == load_run(write("", "empty.yaml"), ["model.size=tiny"])


def test_interpolation(monkeypatch, write):
    monkeypatch.setenv("ESM2MEGA_TEST_SCRATCH", "/scratch")
    config = write(
        "model: {size: tiny}\nrun_dir: ${oc.env:ESM2MEGA_TEST_SCRATCH}/run\n"
        "train:\n  micro_batch_tokens: 2048\n  global_batch_tokens: ${train.micro_batch_tokens}\n"
    )
    run = load_run(config)
    assert (run.run_dir, run.train.global_batch_tokens) == ("/scratch/run", 2048)


@pytest.mark.parametrize(
    ("name", "max_steps", "expected"),
    [
        ("linear", 500_000, 450_000),
        ("linear", 15, 13),
        ("linear", 1, 1),
        ("cosine_plateau", 100, 90),
        ("cosine", 100, 100),
        ("constant", 100, 100),
    ],
)
def test_decay_steps_are_derived(name, max_steps, expected):
    run = load_run(None, ["model.size=tiny", f"schedule.name={name}", f"train.max_steps={max_steps}"])
    assert run.schedule.decay_steps == expected


def test_the_length_in_steps_follows_from_epochs():
    run = load_run(None, ["model.size=tiny", "train.max_epochs=3", "train.max_steps=7"])
    assert run.schedule.decay_steps is None
    fixed = resolve_max_steps(run, 200)
    assert (fixed.train.max_steps, fixed.schedule.decay_steps) == (200, 180)
    assert resolve(fixed) == fixed and run.train.max_steps == 7
    given = load_run(None, ["model.size=tiny", "train.max_epochs=3", "schedule.decay_steps=5"])
    assert resolve_max_steps(given, 200).schedule.decay_steps == 5


def test_train_is_one_store_or_several(tmp_path):
    run = load_run(None, ["model.size=tiny", "data.train=x", "data.train=[a, b c]", "data.weights=[1, 2.5]"])
    assert run.data.train == ["a", "b c"] == run.data.train_paths()
    assert run.data.weights == [1.0, 2.5]
    save_resolved(run, tmp_path / "run.yaml")
    assert run_from_yaml(tmp_path / "run.yaml") == run
    one = load_run(None, ["model.size=tiny", "data.train=[a, b]", "data.train=${run_dir}/x"])
    assert one.data.train == "runs/esm2/x" and one.data.train_paths() == ["runs/esm2/x"]
    assert load_run(None, ["model.size=tiny"]).data.train_paths() == []


def test_declared_classes_are_text(write, tmp_path):
    """Of one column, or of each of several, null for none; from a file, an override, and a checkpoint."""
    config = write("model: {size: tiny}\ntask:\n  classes: [[007, on], null]\n")
    for overrides, expected in (
        ([], [["007", "on"], None]),
        (["task.classes=[0, 1e5, ' ', 'null']"], ["0", "1e5", " ", "null"]),
        (["task.classes=[[C,E],[1,2]]"], [["C", "E"], ["1", "2"]]),
        (["task.classes=null"], None),
    ):
        run = load_run(config, overrides)
        assert run.task.classes == expected
        save_resolved(run, tmp_path / "stored.yaml")
        stored = run_from_yaml(tmp_path / "stored.yaml")
        assert stored == run == load_run_over(stored, ["seed=1234"])


def test_one_mask_or_one_for_each_target(write, tmp_path):
    """From a file, an override, and what a checkpoint stores."""
    config = write("model: {size: tiny}\ntask:\n  mask_column: [m, null]\n")
    for overrides, expected in (
        ([], ["m", None]),
        (["task.mask_column=m"], "m"),
        (["task.mask_column=[null,n]"], [None, "n"]),
        (["task.mask_column=null"], None),
    ):
        run = load_run(config, overrides)
        assert run.task.mask_column == expected and type(run.task.mask_column) is type(expected)
        save_resolved(run, tmp_path / "stored.yaml")
        stored = run_from_yaml(tmp_path / "stored.yaml")
        assert stored == run == load_run_over(stored, ["seed=1234"])


def test_given_decay_steps_stay():
    assert load_run(None, ["model.size=tiny", "schedule.decay_steps=5"]).schedule.decay_steps == 5


def test_resolve_leaves_its_argument_alone():
    run = Run()
    run.model.size = "tiny"
    resolve(run)
    assert run.model.num_layers is None and run.schedule.decay_steps is None


# Text that YAML would read as a number, a truth value, a time, nothing, or a name of something else.
ODD_TEXTS = (
    *("007", "2026_11_26", "010", "1.10", "1E5", "1e-5", "12:30:00", "2026-11-26", "0x1F", ".5", ".nan"),
    *("on", "off", "yes", "no", "true", "False", "y", "N", "Null", "NULL", "~x", "~/x", "=", "<<", "*", "-"),
    *("{version}", "{time}/x", "ünïcode", "a:", "b#c", "a b", "a: b # c", "a, b", "x]", "%a", "@a", "null x"),
)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_a_text_key_takes_what_stands_there(write, text):
    """As a word of the command line, and in YAML with quotes; without them where that is YAML at all."""
    keys = {"run_dir": text, "init_from": text, "data.train": text, "task.mask_column": text}
    assert texts_of(load_run(None, SIZE + [f"{key}={text}" for key in keys])) == keys
    quoted = text.replace("'", "''")
    assert texts_of(load_run(write("".join(f"{key}: '{quoted}'\n" for key in keys)), SIZE)) == keys
    assert texts_of(load_run(None, SIZE + [as_word(key, text) for key in keys])) == keys


@pytest.mark.parametrize("text", [t for t in ODD_TEXTS if not re.search(r"[:#,\]{}'%@*? ]|^-$|<<", t)])
def test_text_needs_no_quotes_in_yaml(write, text):
    file = write(
        f"run_dir: {text}\ninit_from: {text}\ndata: {{train: {text}}}\ntask:\n  mask_column: {text}\n"
        f"  target_columns: [a, {text}]\nfinetune: {{lr_scale: {{{text}: 2}}, freeze: [{text}]}}\n"
    )
    run = load_run(file, SIZE)
    assert set(texts_of(run).values()) == {text}
    assert (run.task.target_columns, run.finetune.freeze) == (["a", text], [text])
    assert run.finetune.lr_scale == {text: 2.0}
    words = [f"task.target_columns=[a,{text}]", f"data.train=[{text}, b]", f"finetune.lr_scale={{{text}: 2}}"]
    run = load_run(None, SIZE + words)
    assert (run.task.target_columns, run.data.train) == (["a", text], [text, "b"])
    assert run.finetune.lr_scale == {text: 2.0}


def test_null_is_null_where_the_key_may_be_unset(write):
    for word in ("null", "~", ""):
        run = load_run(None, [*SIZE, f"init_from={word}", f"data.train={word}", f"task.mask_column={word}"])
        assert (run.init_from, run.data.train, run.task.mask_column) == (None, None, None)
        run = load_run(write(f"init_from: {word}\ndata:\n  train: {word}\n"), [*SIZE])
        assert (run.init_from, run.data.train) == (None, None)
    run = load_run(None, [*SIZE, "run_dir=null", "init_from='null'", "task.target_columns=[null, ~]"])
    assert (run.run_dir, run.init_from, run.task.target_columns) == ("null", "null", ["null", "~"])
    assert load_run(None, [*SIZE, "task.mask_column=[null, 'null']"]).task.mask_column == [None, "null"]


def test_typed_keys_are_parsed_as_their_type_says(write):
    file = write(
        "seed: 010\noptim: {lr: 1E-3, betas: [.9, 95e-2]}\nlogging: {wandb: on, tensorboard: 'no'}\n"
    )
    run = load_run(file, [*SIZE, "train.max_steps=1_000", "infer.layers=[-1, 2]"])
    assert (run.seed, run.optim.lr, run.optim.betas) == (10, 1e-3, [0.9, 0.95])
    assert (run.logging.wandb, run.logging.tensorboard) == (True, False)
    assert (run.train.max_steps, run.infer.layers) == (1000, [-1, 2])


def texts_of(run: Run) -> dict[str, object]:
    values = flatten(run)
    return {key: values[key] for key in ("run_dir", "init_from", "data.train", "task.mask_column")}


@pytest.mark.parametrize("text", ["plain", "null", "~", "[x]", "'quoted'", "${x}", "\\${x}", "a\nb", " a "])
def test_resolved_configuration_round_trip(tmp_path, text):
    run = load_run("pretrain_esm2_650M", ["optim.eps=1e-8", "optim.betas=[0.9,0.95]", "data.crop=start"])
    run.logging.wandb_run_name = text
    run.task.target_columns = [*ODD_TEXTS, text]
    save_resolved(run, tmp_path / "config.yaml")
    assert run_from_yaml(tmp_path / "config.yaml") == run
    assert load_run(str(tmp_path / "config.yaml")) == run
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# `???` is how OmegaConf writes a value that must still be given; it has no way to write it as text.
TEXT = st.one_of(st.text(min_size=1), st.text("$\\\\{}'\"a: ~", min_size=1)).filter(
    lambda t: t.strip() != "???"
)


@settings(max_examples=25, deadline=None)
@given(
    text=TEXT,
    texts=st.lists(TEXT),
    train=st.one_of(st.none(), TEXT, st.lists(TEXT, min_size=1)),
    gaps=st.lists(st.one_of(st.none(), TEXT), min_size=1),
    scales=st.dictionaries(TEXT, st.floats(0.1, 9)),
)
def test_any_text_is_written_and_read_back(tmp_path_factory, text, texts, train, gaps, scales):
    run = load_run(None, SIZE)
    run.run_dir = run.checkpoint.resume = run.init_from = text
    run.task.target_columns, run.data.train, run.task.mask_column = texts, train, gaps
    run.finetune.lr_scale = scales
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    save_resolved(run, path)
    assert run_from_yaml(path) == run == load_run(str(path)) == load_run_over(run, [])
    words = {"run_dir": text, "task.target_columns": texts, "data.train": train, "task.mask_column": gaps}
    found = flatten(load_run(None, SIZE + [as_word(key, value) for key, value in words.items()]))
    assert {key: found[key] for key in words} == words


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    run = load_run(None, ["model.size=tiny"])
    save_resolved(run, tmp_path / "config.yaml")
    before = (tmp_path / "config.yaml").read_bytes()

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", no_space)
    with pytest.raises(MachineError, match="config.yaml: cannot be written: No space left on device"):
        save_resolved(run, tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_run_from_yaml_does_not_look_up_names():
    with pytest.raises(UserError, match="pretrain_esm2_8M: cannot read the configuration: No such file"):
        run_from_yaml("pretrain_esm2_8M")


def test_the_configuration_of_a_checkpoint_is_read_literally(write, tmp_path, monkeypatch):
    """No variable, no other key, no other file, in no place of it; and it is written again as it was."""
    monkeypatch.setenv("SECRET", "revealed")
    keep = tmp_path / "kept.yaml"
    for text in (
        "${oc.env:SECRET}",
        "a${seed}",
        "${oc.env:SECRET",
        "\\\\${seed}",
        "${${seed}}",
        "~/x",
        "{version}",
    ):
        quoted = text.replace("'", "''")
        path = write(
            f"run_dir: '{quoted}'\nmodel: {{size: tiny}}\nlogging: {{wandb_project: '{quoted}'}}\n"
            f"data: {{train: ['{quoted}', b], cache_dir: '{quoted}'}}\n"
            f"task: {{target_columns: ['{quoted}'], classes: [['{quoted}']]}}\n"
        )
        run = run_from_yaml(path)
        found = [run.run_dir, run.data.train[0], run.data.cache_dir, run.logging.wandb_project]
        found += [run.task.target_columns[0], run.task.classes[0][0]]
        assert len({*found}) == 1 and "revealed" not in found[0] and "1234" not in found[0]
        assert "\\" in text or found[0] == text
        save_resolved(run, keep)
        assert run_from_yaml(keep) == load_run_over(run, []) == run
    for line in (
        "seed: ${oc.env:SECRET}",
        "logging: {wandb: '${oc.env:SECRET}'}",
        "optim: {betas: ['${seed}']}",
    ):
        with pytest.raises(UserError, match=":2: ") as error:
            run_from_yaml(write(f"model: {{size: tiny}}\n{line}\n"))
        assert "revealed" not in str(error.value)
    with pytest.raises(UserError, match=":1: unknown key defaults"):
        run_from_yaml(write("defaults: [base]\n"))


def test_run_from_yaml_ignores_only_what_it_is_told_to(write):
    path = write("model: {size: tiny}\ntokenizer: abc\n")
    assert run_from_yaml(path, ignore=["tokenizer"]).model.size == "tiny"
    with pytest.raises(UserError, match=":2: unknown key tokenizer"):
        run_from_yaml(path)


def test_defaults_of_a_file_say_nothing_against_the_model_under_it(write):
    """`base` lists every key, also those of the model; a file that sets one of them still counts."""
    base = load_run(None, ["model.size=8M", "model.precision=bf16", "model.layernorm_epsilon=1e-12"])
    run = load_run_over(base, ["optim.lr=1e-3"], "base")
    assert run.model == base.model and run.optim.lr == 1e-3
    file = write("defaults: base\nmodel:\n  precision: fp64\noptim:\n  lr: 4e-4\n")
    run = load_run_over(run, ["model.layernorm_epsilon=1e-5"], str(file))
    assert (run.model.precision, run.model.num_layers, run.model.layernorm_epsilon) == ("fp64", 6, 1e-5)
    # Other sections are as the file says, defaults too.
    assert run.optim.lr == 4e-4


def test_what_a_file_says_of_the_model_holds_although_it_is_the_default(write):
    base = load_run(None, ["model.size=tiny", "model.precision=bf16", "model.activation=gelu_tanh"])
    file = write("defaults: base\nmodel:\n  precision: fp32\n")
    run = load_run_over(base, [], str(file))
    assert (run.model.precision, run.model.activation) == ("fp32", "gelu_tanh")


def test_load_run_over_changes_a_resolved_run_and_leaves_it_alone():
    base = load_run(None, ["model.size=tiny"])
    changed = load_run_over(base, ["train.micro_batch_tokens=2048"])
    assert (base.train.micro_batch_tokens, changed.train.micro_batch_tokens) == (4096, 2048)
    assert load_run_over(base, []) == base
    with pytest.raises(UserError, match="unknown key train.lr; the nearest valid key is optim.lr"):
        load_run_over(base, ["train.lr=1"])


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("trian.max_steps", "train.max_steps"),
        ("train.max_step", "train.max_steps"),
        ("train.lr", "optim.lr"),
        ("train.seed", "seed"),
        ("lr", "optim.lr"),
        ("learning_rate.warmup_steps", "schedule.warmup_steps"),
        ("tensor_model_parallel_size", "parallel.tensor_model_parallel_size"),
        ("train.tensor_model_parallel_size", "parallel.tensor_model_parallel_size"),
        ("parallel.tensor_parallel_size", "parallel.tensor_model_parallel_size"),
        ("micro_batch_size", "train.micro_batch_size"),
        ("data.max_length", "data.max_seq_length"),
        ("early_stopping.patience", "train.early_stopping.patience"),
        ("optim.lr.value", "optim.lr"),
    ],
)
def test_unknown_key_names_the_nearest(wrong, meant):
    assert nearest_key(wrong) == meant
    assert error_of(None, f"{wrong}=1") == f"override: unknown key {wrong}; the nearest valid key is {meant}"


def test_known_keys_are_those_of_the_schema():
    assert list(known_keys()) == [*flatten(Run()), FROM]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_steps=abc", "train.max_steps=abc: expected an integer"),
        ("train.max_steps=1.5", "train.max_steps=1.5: expected an integer"),
        ("train.max_steps=true", "train.max_steps=true: expected an integer"),
        ("train.max_steps=null", "train.max_steps=null: expected an integer"),
        ("train.max_steps=", "train.max_steps=null: expected an integer"),
        ("model.num_layers=x", "model.num_layers=x: expected an integer or null"),
        ("optim.lr=fast", "optim.lr=fast: expected a number"),
        ("optim.lr=[1]", "optim.lr=[1]: expected a number"),
        ("parallel.sequence_parallel=3", "parallel.sequence_parallel=3: expected true or false"),
        ("parallel.sequence_parallel=maybe", "parallel.sequence_parallel=maybe: expected true or false"),
        ("optim.betas=0.9", "optim.betas=0.9: expected a list of numbers"),
        ("optim.betas=[a,b]", "optim.betas=[a, b]: expected a list of numbers"),
        ("data.train=[]", "data.train=[]: expected text, a list of texts or null"),
        ("data.train=[a, [b]]", "data.train=[a, [b]]: expected text, a list of texts or null"),
        ("data.train=[a, '']", "data.train=[a, '']: expected text, a list of texts or null"),
        ("task.mask_column=[m, {a: b}]", "[m, {a: b}]: expected text, a list of texts and nulls, or null"),
        ("task.target_columns=a", "task.target_columns=a: expected a list of texts, as in [a, b]"),
        ("task.target_columns=[[a]]", "task.target_columns=[[a]]: expected a list of texts, as in [a, b]"),
        ("task.target_columns=null", "task.target_columns=null: expected a list of texts, as in [a, b]"),
        ("task.mask_column=[]", "task.mask_column=[]: expected text, a list of texts and nulls, or null"),
        (
            "task.classes=C",
            "task.classes=C: expected a list of texts, a list of such lists and nulls, or null",
        ),
        ("task.classes=[]", "task.classes=[]: expected a list of texts"),
        ("task.classes=[[[C]]]", "task.classes=[[[C]]]: expected a list of texts"),
        ("data.train=''", "data.train='': expected text, a list of texts or null"),
        ("data.train={a: 1}", "data.train={a: 1}: expected text, a list of texts or null"),
        ("data.weights=[a]", "data.weights=[a]: expected a list of numbers or null"),
        ("run_dir=!!binary AAAA", "the value is not valid YAML: could not determine a constructor"),
        ("run_dir=", "run_dir=null: expected text"),
        ("run_dir=[a]", "run_dir=[a]: expected text"),
        ("run_dir={a: 1}", "run_dir={a: 1}: expected text"),
        ("run_dir=''", "run_dir='': expected text"),
        ("train=5", "train is a section, not a value; set its keys, e.g. train.micro_batch_tokens"),
        ("train.early_stopping=5", "train.early_stopping is a section, not a value"),
        ("seed=${run_dir}", "'runs/esm2' of type 'str' could not be converted to Integer"),
        ("run_dir=${nowhere}", "run_dir: Interpolation key 'nowhere' not found"),
        ("run_dir=${", "override: run_dir=${: no viable alternative at input '${'; correct the ${...}"),
        ("run_dir='a'b", "the value is not valid YAML"),
        ("data.train=${seed}", "data.train=${seed} refers to 1234, which is not text; expected text, a list"),
        ("data.train=[a, '${seed}']", "data.train=[a, ${seed}] refers to [a, 1234], which is not text"),
        ("run_dir=a\udcff", "is not text in UTF-8"),
        ("seed=" + "[" * 2000, "the value is not valid YAML"),
        ("optim.betas=[0.9", "override 'optim.betas=[0.9': the value is not valid YAML"),
        ("data.train=???", "data.train=??? must be given; add the override data.train=VALUE"),
        (
            "model.size=650",
            "model.size=650 is not one of tiny, 8M, 35M, 150M, 650M, 3B, 15B; did you mean 650M?",
        ),
        ("max_steps", "override 'max_steps' is not key=value"),
        ("=3", "override '=3' is not key=value"),
    ],
)
def test_bad_override(override, expected):
    assert expected in error_of(None, "model.size=8M", override)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "seed: 1\ntrain:\n  max_stepz: 4\n",
            ":3: unknown key train.max_stepz; the nearest valid key is train.max_steps",
        ),
        ("seed: 1\n\ntrain:\n  max_steps: x\n", ":4: train.max_steps=x: expected an integer"),
        ("train: 5\n", ":1: train is a section, not a value"),
        ("3: 4\n", ":1: unknown key 3"),
        ("seed: [1\nrun_dir: x\n", ":2: not valid YAML"),
        ("seed: 1\nseed: 2\n", ":2: not valid YAML: found duplicate key seed"),
        ("\tseed: 1\n", ":1: not valid YAML"),
        ("seed: *nothing\n", ":1: not valid YAML: found undefined alias"),
        ("seed: !!python/object:os.system x\n", ":1: not valid YAML: could not determine a constructor"),
        ("run_dir: ${nowhere}\n", ":1: run_dir: Interpolation key 'nowhere' not found"),
        ("data:\n  train: ???\n", ":2: data.train=??? must be given"),
        ("- a\n- b\n", "the top level must be `key: value` pairs"),
        ("word\n", "the top level must be `key: value` pairs"),
        ("defaults: {a: b}\n", ":1: defaults must be a name or a list of names, got {a: b}"),
        ("defaults: 3\n", ":1: no configuration file or shipped name '3'"),
        ("seed: !!timestamp x\n", ":1: seed=x: expected an integer"),
        ("seed: !!set {a}\n", ":1: not valid YAML: could not determine a constructor"),
        ("seed: " + "9" * 5000, ":1: seed=" + "9" * 200 + "…: expected an integer"),
        ("seed: " + "{a: " * 900 + "1" + "}" * 900, ":1: not valid YAML: nested too deeply"),
        ("seed: &a [*a]\n", ":1: not valid YAML: an alias contains itself"),
        (
            "a: &a [1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n" * 1 + "c: [" + "*b," * 999 + "]\n",
            "10,000 values",
        ),
        ("run_dir: {version}/x\n", "not valid YAML"),
        ("seed: " + "[" * 5000 + "\n", "not valid YAML"),
        ("seed: 1\ndefaults: [pretrain_8M]\n", ":2: no configuration file or shipped name 'pretrain_8M'"),
        ("defaults: run\n", "includes itself through `defaults`"),
        (b"\x00\x01binary", "not a YAML configuration"),
        (b"\xff\xfe\x00", "not a text file in UTF-8 (byte 0)"),
    ],
)
def test_bad_file_names_file_and_line(write, content, expected):
    config = write(content)
    message = error_of(config, "model.size=8M")
    assert expected in message
    assert message.startswith(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("pretrain_8M", "did you mean pretrain_esm2_8M?"),
        ("nowhere.yaml", "configuration file nowhere.yaml does not exist"),
        ("some/where", "configuration file some/where does not exist"),
        (".", "configuration file . is a directory"),
    ],
)
def test_missing_file(config, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(config)
    assert expected in message
    assert "pretrain_esm2_650M" in message


def test_unreadable_file(write, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    config = write("seed: 1\n")
    monkeypatch.setattr(Path, "read_text", refuse)
    assert error_of(config) == f"{config}: cannot read the configuration: Permission denied"
