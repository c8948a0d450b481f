"""The shipped configurations: base.yaml is the schema, the others are the published recipes."""

import re
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from esm2mega.config.architecture import FROM
from esm2mega.config.batches import num_micro_batches
from esm2mega.config.load import conf_dir, config_names, given_keys, load_run
from esm2mega.config.presets import PRESETS, ModelShape, shape_of
from esm2mega.config.schema import Run, flatten
from esm2mega.config.task import validate_task
from esm2mega.config.validate import validate
from esm2mega.data.benchmarks.names import FLIP_TASKS, TAPE_TASKS
from esm2mega.errors import UserError
from esm2mega.finetune.defaults import BATCH, LENGTH, SINGLE

SIZES = [size for size in PRESETS if size != "tiny"]
TAPE_CONFIGS = {f"tape_{task.removesuffix('_prediction')}": task for task in TAPE_TASKS}
LAYOUT = re.compile(r"^# layout (\d+):(.*)$", re.MULTILINE)


def layouts(name: str) -> list[tuple[int, str]]:
    """The `# layout PROCESSES: overrides` lines of a shipped configuration."""
    return [(int(n), text.strip()) for n, text in LAYOUT.findall((conf_dir() / f"{name}.yaml").read_text())]


def test_all_sizes_are_shipped():
    deeploc2 = {"deeploc2", "deeploc2_150M", "deeploc2_650M"}
    tasks = {*deeploc2, *(f"flip_{task}" for task in FLIP_TASKS), *TAPE_CONFIGS}
    pretraining = {"pretrain_proteinlm_200M", *(f"pretrain_esm2_{size}" for size in PRESETS)}
    assert set(config_names()) == {"base", "infer", *pretraining, *tasks}


def test_base_lists_the_keys_and_defaults_of_the_schema():
    def leaves(tree, prefix=""):
        for name, value in tree.items():
            if value and isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    base = dict(leaves(OmegaConf.to_container(OmegaConf.load(conf_dir() / "base.yaml"))))
    schema = flatten(Run())
    assert base.pop(FROM) is None  # stands for others, and no run has it
    assert list(base) == list(schema)
    assert base == schema


def test_base_documents_every_key():
    """A comment stands above each key, or above the keys of the same block right before it."""
    documented = False
    for line in (conf_dir() / "base.yaml").read_text().splitlines():
        if line.lstrip().startswith("#"):
            documented = True
        elif not line.strip() or re.fullmatch(r"\s*\w+:", line):
            documented = False
        else:
            assert documented, line


@pytest.mark.parametrize("size", PRESETS)
def test_deltas_only(size):
    content = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"pretrain_esm2_{size}.yaml"))
    assert content.pop("defaults") == "base"
    schema = flatten(Run())
    flat = {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in content.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
    assert [key for key, value in flat.items() if schema[key] == value and "micro" not in key] == []


@pytest.mark.parametrize("size", SIZES)
def test_published_recipe(size):
    run = load_run(f"pretrain_esm2_{size}")
    assert run.model.size == size
    assert run.model.precision == "bf16"
    assert run.train.max_steps == 500_000
    assert run.train.global_batch_tokens == 2_097_152
    assert run.data.max_seq_length == 1024
    assert run.optim.lr == (1.6e-4 if size == "15B" else 4e-4)
    assert run.optim.weight_decay == (0.1 if size == "15B" else 0.01)
    assert (run.optim.betas, run.optim.eps, run.optim.clip_grad) == ([0.9, 0.98], 1e-8, 1.0)
    assert (run.schedule.name, run.schedule.warmup_steps, run.schedule.decay_steps) == (
        "linear",
        2000,
        450_000,
    )
    assert run.schedule.min_lr_ratio == 0.1
    assert (run.data.mlm_probability, run.data.mask_fraction, run.data.random_fraction) == (0.15, 0.8, 0.1)


@pytest.mark.parametrize("size", PRESETS)
def test_documented_layouts_are_valid(size):
    name = f"pretrain_esm2_{size}"
    found = layouts(name)
    assert {n for n, _ in found} >= ({1, 2} if size == "tiny" else {1, 8, 64})
    for processes, text in found:
        if text.startswith("does not fit"):
            assert (size, processes) == ("15B", 1)
            continue
        run = load_run(name, text.split())
        validate(run, processes)
        assert num_micro_batches(run.train, run.parallel, processes) >= 1


RULE = re.compile(
    r"^# Tensor parallel sizes must divide (\d+) heads, .* A pipeline has at most\n# (\d+) stages",
    re.MULTILINE,
)


@pytest.mark.parametrize("name", [name for name in config_names() if re.match("pretrain_.*[MB]$", name)])
def test_layouts_that_a_file_rules_out_are_those_that_are_refused(name):
    """Every tensor and pipeline parallel size up to one more than the heads and layers that it names."""
    text = (conf_dir() / f"{name}.yaml").read_text()
    (rule,) = RULE.findall(text)
    heads, layers = map(int, rule)

    def is_allowed(key, size):
        try:
            validate(replace(run, parallel=replace(run.parallel, **{key: size})), size)
        except UserError:
            return False
        return True

    run = load_run(name)
    sizes = [size for size in range(1, heads + 2) if is_allowed("tensor_model_parallel_size", size)]
    assert sizes == [size for size in range(1, heads + 1) if heads % size == 0]
    stages = [size for size in range(1, layers + 2) if is_allowed("pipeline_model_parallel_size", size)]
    assert stages == list(range(1, layers + 1))


def test_tiny_is_for_a_cpu_and_minutes():
    run = load_run("pretrain_esm2_tiny")
    assert run.model.precision == "fp32"
    assert run.train.max_steps * run.train.global_batch_tokens < 5_000_000
    for world_size in (1, 2):
        validate(run, world_size)


@pytest.mark.parametrize("path", sorted((conf_dir() / "finetune").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_task_leaves_nothing_to_be_chosen(path):
    """Its numbers are those of the file, whatever `finetune` chooses for other configurations."""
    given = given_keys(str(path))
    assert {*SINGLE} <= given and given & {*LENGTH} and given & {*BATCH}


@pytest.mark.parametrize("task", FLIP_TASKS)
def test_every_task_of_flip_is_configured(task):
    """By its name alone or with its folder; kind, classes and mask are those of the prepared tables."""
    run = load_run(f"flip_{task}", ["model.size=tiny"])
    assert run == load_run(f"finetune/flip_{task}", ["model.size=tiny"])
    validate(run, 1)
    validate_task(run)
    published = FLIP_TASKS[task]
    assert run.task.kind == published.kind
    classes = {"scl": 10, "sav": 2, "conservation": 9, "secondary_structure": 3}  # as published
    assert run.task.num_classes == classes.get(task)
    assert run.task.classes == (list("01234567") if task == "bind" else None)
    assert (run.task.target_columns, run.task.mask_column) == (
        ["target"],
        "mask" if published.masked else None,
    )
    folder = f"flip/{task}"
    assert run.data.train_paths() == [f"{folder}/train.csv"]
    assert (run.data.valid, run.data.test) == (f"{folder}/valid.csv", f"{folder}/test.csv")


@pytest.mark.parametrize(("size", "proteins", "evaluated"), [("150M", 4, 100), ("650M", 432, 50)])
def test_published_sizes_of_deeploc2(size, proteins, evaluated):
    run = load_run(f"deeploc2_{size}")
    validate(run, 1)
    validate_task(run)
    assert (run.model.size, run.model.precision) == (size, "bf16")
    assert (run.train.global_batch_size, run.train.eval_every) == (proteins, evaluated)
    assert (run.train.max_steps, run.train.max_epochs) == ((1000, None) if size == "650M" else (1000, 6))
    assert (run.optim.lr, run.optim.betas, run.optim.clip_grad) == (1e-5, [0.9, 0.98], 0.0)
    assert (run.schedule.warmup_steps, run.schedule.decay_steps) == (500, 5000)
    head = (run.task.head, run.task.pooler_activation, run.task.dropout, run.task.num_classes)
    assert head == ("pooler", "gelu", 0.4, 2)


@pytest.mark.parametrize("name", TAPE_CONFIGS)
def test_every_task_of_tape_is_configured(name):
    """Hyper-parameters are the defaults of TAPE and ProteinLM, and proteins those that ProteinLM takes."""
    run = load_run(name, ["model.size=tiny"])
    validate(run, 1)
    validate_task(run)
    published = TAPE_TASKS[TAPE_CONFIGS[name]]
    assert (run.task.kind, run.task.head) == (published.kind, "tape")
    classes = {"tape_remote_homology": 1195, "tape_secondary_structure": 3, "tape_secondary_structure_8": 8}
    assert run.task.num_classes == classes.get(name)
    assert run.task.mask_column == ("mask" if published.kind == "contact" else None)
    assert (run.optim.lr, run.optim.weight_decay, run.optim.clip_grad) == (1e-4, 0.01, 1.0)
    assert (run.optim.betas, run.optim.eps, run.train.max_epochs) == ([0.9, 0.999], 1e-6, 10)
    assert (run.data.max_seq_length, run.data.too_long) == (512 + 2, "drop")
    folder = f"tape/{name.removeprefix('tape_')}"
    assert run.data.train_paths() == [f"{folder}/train.csv"] and run.data.valid == f"{folder}/valid.csv"
    assert run.data.test is not None
    assert run.data.test.removeprefix(f"{folder}/").removesuffix(".csv") in published.splits[2:]


def test_proteinlm_pretrains_what_its_fork_of_tape_reads():
    """Shape, numerics and schedule are as published; GELU and the last LayerNorm are those of the fork."""
    run = load_run("pretrain_proteinlm_200M")
    assert shape_of(run.model) == ModelShape(16, 1024, 4096, 16)
    model = run.model
    assert (model.family, model.activation, model.final_layernorm) == ("proteinbert_preln", "gelu", False)
    assert (model.layernorm_epsilon, model.max_positions, run.data.max_seq_length) == (1e-12, 2176, 2176)
    assert (run.optim.lr, run.optim.weight_decay, run.optim.clip_grad) == (1e-4, 0.01, 1.0)
    assert (run.schedule.name, run.schedule.warmup_steps, run.schedule.decay_steps) == (
        "linear",
        9_900,
        990_000,
    )
    assert (run.train.max_steps, run.schedule.min_lr_ratio) == (1_000_000, 0.1)
    found = layouts("pretrain_proteinlm_200M")
    assert {n for n, _ in found} == {1, 8, 64}
    for processes, text in found:
        run = load_run("pretrain_proteinlm_200M", text.split())
        validate(run, processes)
        assert num_micro_batches(run.train, run.parallel, processes) >= 1
