"""Every rule on a whole configuration, with the words of its message."""

import importlib.machinery
import sys
import types

import pytest

from esm2mega.config.load import load_run
from esm2mega.config.schema import Run
from esm2mega.config.validate import check_training_inputs, validate
from esm2mega.errors import UserError

BASE = [
    "model.size=8M",
    "schedule.warmup_steps=10",
]  # 6 layers, hidden 320, 20 heads; T = global batch = 4096


def make(*overrides: str) -> Run:
    return load_run(None, [*BASE, *overrides])


RULES = [
    # model
    (["model.size=null", "model.num_layers=1", "model.hidden_size=7", "model.ffn_hidden_size=8",
      "model.num_attention_heads=2"], 1,
     "model.hidden_size=7 is not divisible by model.num_attention_heads=2"),
    (["model.size=null", "model.num_layers=1", "model.hidden_size=6", "model.ffn_hidden_size=8",
      "model.num_attention_heads=2"], 1, "gives head dimension 3, which is odd"),
    (["model.size=null", "model.num_layers=0", "model.hidden_size=6", "model.ffn_hidden_size=8",
      "model.num_attention_heads=2"], 1, "model.num_layers=0 is too small; it must be at least 1"),
    (["model.attention_backend=flash"], 1, "model.attention_backend=flash computes in half precision only"),
    (["model.attention_backend=varlen", "model.precision=fp64"], 1, "set model.precision=bf16"),
    (["model.precision=fp64", "model.layer_spec=te"], 1, "model.precision=fp64 does not exist in"),
    (["model.precision=fp64", "model.attention_backend=te"], 1, "does not exist in Transformer Engine"),
    (["model.hidden_dropout=-0.1"], 1, "model.hidden_dropout=-0.1 is too small; it must be at least 0"),
    (["model.attention_dropout=1"], 1, "model.attention_dropout=1.0 is too large; it must be at most 0.99"),
    *((["model.attention_dropout=0.1", f"model.attention_backend={backend}", "model.precision=bf16"], 1,
       f"and model.attention_backend={backend} takes none; set model.attention_backend=sdpa or "
       "model.attention_dropout=0") for backend in ("varlen", "flash", "te")),
    (["model.layernorm_epsilon=0"], 1, "model.layernorm_epsilon=0.0 must be greater than 0"),
    (["model.init_std=-1"], 1, "model.init_std=-1.0 must be greater than 0"),
    *((["model.compile=true", f"{key}={value}"], 2,
       f"compiles no layers with {key}={value}; set model.compile=false")
      for key, value in (("parallel.tensor_model_parallel_size", 2), ("model.layer_spec", "te"),
                         ("model.attention_backend", "te"),
                         ("model.hidden_dropout", 0.1), ("lora.rank", 4))),
    *((["model.fp8=hybrid", "model.precision=bf16", f"{key}={value}"], 1,
       f"model.fp8=hybrid needs layers of Transformer Engine in bf16, and there are none with {key}={value}; "
       "set model.fp8=null")
      for key, value in (("model.precision", "fp16"), ("model.layer_spec", "local"), ("lora.rank", 4),
                         ("model.compile", True))),
    (["model.fp8=e4m3", "model.precision=bf16", "parallel.tensor_model_parallel_size=2",
      "model.fp8_recipe=mxfp8", "model.size=35M"], 2, "model.fp8_recipe=mxfp8 needs a multiple of 32 on each "
     "of the 2 processes that share it, and model.hidden_size=480 is no multiple of 64; set model.fp8=null"),
    (["model.fp8=e4m3", "model.precision=bf16", "parallel.tensor_model_parallel_size=2",
      "parallel.sequence_parallel=true", "train.micro_batch_tokens=2056"], 2,
     "and train.micro_batch_tokens=2056 is no multiple of 32; set model.fp8=null"),
    # layout
    (["parallel.tensor_model_parallel_size=3"], 3,
     "model.num_attention_heads=20 is not divisible by parallel.tensor_model_parallel_size=3; "
     "choose one of 1, 2, 4, 5, 10, 20"),
    (["model.size=null", "model.num_layers=1", "model.hidden_size=8", "model.ffn_hidden_size=6",
      "model.num_attention_heads=4", "parallel.tensor_model_parallel_size=4"], 4,
     "model.ffn_hidden_size=6 is not divisible by parallel.tensor_model_parallel_size=4; choose one of 1, 2"),
    (["parallel.pipeline_model_parallel_size=7"], 7,
     "model.num_layers=6 is smaller than parallel.pipeline_model_parallel_size=7, but every stage needs a "
     "layer; set parallel.pipeline_model_parallel_size=6 or less"),
    (["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=2"], 4,
     "= 8; set parallel.virtual_pipeline_model_parallel_size=null, which allows stages of unequal length"),
    (["parallel.virtual_pipeline_model_parallel_size=2"], 1,
     "parallel.virtual_pipeline_model_parallel_size=2 needs parallel.pipeline_model_parallel_size > 1"),
    (["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"], 2,
     "parallel.virtual_pipeline_model_parallel_size=2 = 4; for this pipeline size choose one of 1, 3"),
    (["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=3",
      "train.global_batch_tokens=12288"], 2,
     "3 micro-batches per step (train.global_batch_tokens=12288) are not divisible by "
     "parallel.pipeline_model_parallel_size=2"),
    (["parallel.sequence_parallel=true"], 1,
     "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1"),
    (["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true",
      "train.micro_batch_tokens=1026", "train.global_batch_tokens=1026"], 4,
     "train.micro_batch_tokens=1026 is not divisible by parallel.tensor_model_parallel_size=4, which "
     "parallel.sequence_parallel=true needs; set train.micro_batch_tokens=1028"),
    (["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=3"], 8,
     "world size 8 is not a multiple of parallel.tensor_model_parallel_size=2 x "
     "parallel.pipeline_model_parallel_size=3 = 6"),
    (["parallel.tensor_model_parallel_size=2"], 1, "world size 1 is not a multiple of"),
    (["parallel.context_parallel_size=3", "train.micro_batch_tokens=4098"], 4,
     "world size 4 is not a multiple of parallel.tensor_model_parallel_size=1 x "
     "parallel.pipeline_model_parallel_size=1 x parallel.context_parallel_size=3 = 3"),
    (["parallel.context_parallel_size=0"], 1, "parallel.context_parallel_size=0 is too small"),
    (["parallel.context_parallel_size=3"], 3,
     "train.micro_batch_tokens=4096 is not divisible by parallel.context_parallel_size=3; set "
     "train.micro_batch_tokens=4098"),
    (["parallel.context_parallel_size=3", "parallel.tensor_model_parallel_size=2",
      "parallel.sequence_parallel=true", "model.attention_backend=sdpa"], 6,
     "train.micro_batch_tokens=4096 is not divisible by parallel.context_parallel_size=3 x "
     "parallel.tensor_model_parallel_size=2 = 6, which parallel.sequence_parallel=true needs; set "
     "train.micro_batch_tokens=4098"),
    (["parallel.context_parallel_exchange=heads"], 1,
     "parallel.context_parallel_exchange=heads needs parallel.context_parallel_size > 1; "
     "set parallel.context_parallel_exchange=auto"),
    (["parallel.context_parallel_size=8", "parallel.context_parallel_exchange=heads"], 8,
     "parallel.context_parallel_exchange=heads gives each of parallel.context_parallel_size=8 processes an "
     "equal number of heads, and there are 20"),
    (["parallel.context_parallel_size=2", "model.attention_backend=te"], 2,
     "model.attention_backend=te attends within one process, and parallel.context_parallel_size=2 divides "
     "the tokens; set model.attention_backend=auto"),
    ([], 0, "world size 0 is not a multiple of"),
    (["parallel.tensor_model_parallel_size=0"], 1, "parallel.tensor_model_parallel_size=0 is too small"),
    (["parallel.timeout_minutes=0"], 1, "parallel.timeout_minutes=0.0 must be greater than 0"),
    # batches
    (["train.micro_batch_tokens=1000"], 1,
     "train.micro_batch_tokens=1000 is smaller than data.max_seq_length=1024"),
    (["data.max_seq_length=2"], 1, "data.max_seq_length=2 is too small; it must be at least 3"),
    (["train.global_batch_tokens=20000"], 2, "train.global_batch_tokens=20000 is not a multiple of "
     "train.micro_batch_tokens=4096 x data-parallel size 2 = 8192; "
     "set train.global_batch_tokens=16384 or 24576"),
    ([], 2, "= 8192; set train.global_batch_tokens=8192"),
    (["train.max_steps=0"], 1, "train.max_steps=0 is too small; it must be at least 1"),
    (["train.log_every=0"], 1, "train.log_every=0 is too small; it must be at least 1"),
    (["train.eval_every=-1"], 1, "train.eval_every=-1 is too small; it must be at least 0"),
    (["train.early_stopping.patience=2"], 1, "train.early_stopping.patience=2 counts evaluations"),
    # data
    (["data.mlm_probability=0"], 1, "data.mlm_probability=0.0 must be above 0 and below 1"),
    (["data.mlm_probability=1"], 1, "data.mlm_probability=1.0 must be above 0 and below 1"),
    (["eval.mlm_probability=0"], 1, "eval.mlm_probability=0.0 must be above 0 and below 1"),
    (["eval.mask_fraction=-1"], 1, "eval.mask_fraction=-1.0 is too small; it must be at least 0"),
    (["eval.random_fraction=0.3"], 1, "eval.mask_fraction=0.8 + eval.random_fraction=0.3 is more than 1"),
    (["eval.seed=-1"], 1, "eval.seed=-1 is too small; it must be at least 0"),
    (["data.mask_fraction=1.1"], 1, "data.mask_fraction=1.1 is too large; it must be at most 1"),
    (["data.random_fraction=-0.1"], 1, "data.random_fraction=-0.1 is too small; it must be at least 0"),
    (["data.mask_fraction=0.8", "data.random_fraction=0.3"], 1,
     "data.mask_fraction=0.8 + data.random_fraction=0.3 is more than 1"),
    (["data.train=store", "data.valid=./x/../store"], 1, "data.valid=./x/../store is also data.train"),
    (["data.train=store", "data.test=store"], 1, "data.test=store is also data.train"),
    (["data.train=[a, b]", "data.valid=b"], 1, "data.valid=b is also data.train"),
    (["data.train=[a, b, ./a]"], 1, "data.train names ./a twice; name it once and raise its data.weights"),
    (["data.train=[a, b]", "data.weights=[1]"], 1, "data.weights=[1.0] has 1 numbers, data.train names 2"),
    (["data.train=a", "data.weights=[1]"], 1, "give one weight for each of two stores or more"),
    (["data.train=[a, b]", "data.weights=[1, 0]"], 1, "[1.0, 0.0] must be numbers greater than 0"),
    (["data.train=[a, b]", "data.weights=[1, .inf]"], 1, "must be numbers greater than 0"),
    (["data.train=[a, b]", "train.max_epochs=2"], 1, "train.max_epochs=2 counts passes over one store"),
    (["train.max_epochs=0"], 1, "train.max_epochs=0 is too small; it must be at least 1"),
    (["train.max_epochs=1", "schedule.decay_steps=10"], 1, "schedule.warmup_steps=10 is not smaller than"),
    (["data.workers=-1"], 1, "data.workers=-1 is too small; it must be at least 0"),
    (["data.pack_window=0"], 1, "data.pack_window=0 is too small"),
    (["seed=-1"], 1, "seed=-1 is too small; it must be at least 0"),
    (["seed=9223372036854775808"], 1, "seed=9223372036854775808 is too large"),
    # optimizer and schedule
    (["optim.lr=0"], 1, "optim.lr=0.0 must be greater than 0"),
    (["optim.lr=nan"], 1, "optim.lr=nan is not a finite number"),
    (["optim.eps=0"], 1, "optim.eps=0.0 must be greater than 0"),
    (["optim.weight_decay=-0.1"], 1, "optim.weight_decay=-0.1 is too small"),
    (["optim.clip_grad=-1"], 1, "optim.clip_grad=-1.0 is too small"),
    (["optim.betas=[0.9]"], 1, "optim.betas=[0.9] must be two numbers in [0, 1)"),
    (["optim.betas=[0.9,1.0]"], 1, "optim.betas=[0.9, 1.0] must be two numbers in [0, 1)"),
    (["schedule.warmup_steps=900"], 1,
     "schedule.warmup_steps=900 is not smaller than schedule.decay_steps=900 "
     "(by default 90 % of train.max_steps=1000"),
    (["schedule.decay_steps=10"], 1, "schedule.warmup_steps=10 is not smaller than schedule.decay_steps=10"),
    (["schedule.min_lr_ratio=1.5"], 1, "schedule.min_lr_ratio=1.5 is too large; it must be at most 1"),
    # checkpoints
    (["checkpoint.keep_last=0"], 1, "checkpoint.keep_last=0 is too small; it must be at least 1"),
    (["checkpoint.save_every=-5"], 1, "checkpoint.save_every=-5 is too small"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "world_size", "expected"), RULES)
def test_rule(overrides, world_size, expected):
    with pytest.raises(UserError) as caught:
        validate(make(*overrides), world_size)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "model.precision=bf32",
            "model.precision=bf32 is not one of fp32, bf16, fp16, fp64; did you mean fp32?",
        ),
        ("model.precision=BF16", "did you mean bf16?"),
        ("model.size=650m", "did you mean 650M?"),
        ("model.recompute=fully", "is not one of none, selective, full; did you mean full?"),
        ("model.layer_spec=x", "model.layer_spec=x is not one of auto, local, te"),
        ("model.attention_backend=spda", "did you mean sdpa?"),
        ("data.crop=middle", "data.crop=middle is not one of random, start, chunk"),
        ("data.random_residues=amino", "did you mean amino_acids?"),
        ("schedule.name=cosine-plateau", "did you mean cosine_plateau?"),
    ],
)
def test_closed_choice_lists_the_valid_and_the_nearest(override, expected):
    with pytest.raises(UserError) as caught:
        make(override)
    assert expected in str(caught.value)


def test_validate_checks_choices_of_a_run_made_in_python():
    run = make()
    run.task.loss = "mae"
    with pytest.raises(UserError, match=r"task\.loss=mae is not one of mse, huber"):
        validate(run, 1)


def test_validate_needs_a_resolved_run():
    run = make()
    run.schedule.decay_steps = None
    with pytest.raises(UserError, match=r"schedule\.decay_steps is not set"):
        validate(run, 1)
    run.model.num_layers = None
    with pytest.raises(UserError, match=r"model\.num_layers not set"):
        validate(run, 1)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ([], 1),
        (["train.global_batch_tokens=8192"], 2),
        (["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"], 2),
        (["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=3"], 6),
        (["parallel.context_parallel_size=8"], 8),
        (["parallel.context_parallel_size=2", "parallel.tensor_model_parallel_size=2",
          "parallel.context_parallel_exchange=heads", "parallel.sequence_parallel=true",
          "train.global_batch_tokens=8192"], 8),
        (["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=3",
          "train.global_batch_tokens=16384"], 4),
        (["model.precision=fp64"], 1),
        (["model.precision=bf16", "model.attention_backend=flash", "parallel.distributed_optimizer=true"], 1),
        (["model.compile=true", "model.attention_backend=native"], 1),
        (["model.fp8=hybrid", "model.precision=bf16"], 1),
        (["model.fp8=e4m3", "model.precision=bf16", "model.layer_spec=te", "model.fp8_recipe=mxfp8",
          "parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"], 2),
        (["data.max_seq_length=3", "train.micro_batch_tokens=3", "train.global_batch_tokens=6"], 1),
        (["data.mask_fraction=0.9", "data.random_fraction=0.1"], 1),
        (["data.mask_fraction=0", "data.random_fraction=0"], 1),
        (["optim.clip_grad=0", "optim.weight_decay=0", "schedule.warmup_steps=0"], 1),
        (["train.eval_every=5", "train.early_stopping.patience=1"], 1),
        (["data.train=a", "data.valid=b", "data.test=b"], 1),
        (["data.train=a", "data.valid=a", "data.allow_overlap=true"], 1),
        # A run may stop before its schedule ends.
        (["train.max_steps=5", "schedule.decay_steps=100"], 1),
        (["train.max_steps=1", "schedule.warmup_steps=0"], 1),
    ],
)  # fmt: skip
def test_valid(overrides, world_size):
    validate(make(*overrides), world_size)


@pytest.fixture
def stores(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
    return [f"data.train={tmp_path}/train", f"data.valid={tmp_path}/valid", "train.eval_every=5"]


def test_training_inputs_that_exist(stores, tmp_path):
    check_training_inputs(make(*stores))
    check_training_inputs(make(*stores, f"checkpoint.resume={tmp_path}", f"init_from={tmp_path}"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=null", "data.train is not set: give a token store"),
        ("data.train=/nowhere", "data.train=/nowhere is neither a token store nor a file"),
        ("data.train=[/nowhere]", "data.train=/nowhere is neither a token store nor a file"),
        ("data.test=/nowhere", "data.test=/nowhere is neither a token store nor a file"),
        ("data.valid=null", "train.eval_every=5 needs data.valid"),
        ("init_from=/nowhere", "init_from=/nowhere does not exist"),
        (
            "checkpoint.resume=Auto",
            "checkpoint.resume=Auto is neither auto, never nor an existing checkpoint",
        ),
        (f"run_dir={__file__}", "test_validate.py is a file; choose another run_dir"),
        (f"run_dir={__file__}/a/b", "test_validate.py, which is a file; choose another run_dir"),
    ],
)
def test_training_inputs_that_are_missing(stores, override, expected):
    with pytest.raises(UserError) as caught:
        check_training_inputs(make(*stores, override))
    assert expected in str(caught.value)


def test_mixtures_and_epochs_that_are_right():
    validate(make("data.train=[a, b]", "data.weights=[0.7, 3]", "data.valid=c"), 1)
    run = make("data.train=a", "train.max_epochs=2")
    assert run.schedule.decay_steps is None
    validate(run, 1)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_needs_its_package(stores, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"logging.{name}=true, but .* pip install 'esm2mega\[logging\]'"):
        check_training_inputs(make(*stores, f"logging.{name}=true"))
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    check_training_inputs(make(*stores, f"logging.{name}=true"))
