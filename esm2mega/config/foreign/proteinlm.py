"""Lists the options of ProteinLM: Megatron-LM's of the pretraining, and TAPE's of the tasks."""

from __future__ import annotations

import math
import shlex
from fractions import Fraction
from typing import Any

from esm2mega.config.foreign.rules import (
    Habit,
    Settings,
    Source,
    Table,
    absent,
    betas,
    computed,
    elsewhere,
    key,
    same,
    switch,
)
from esm2mega.config.foreign.values import (
    OF_ONE_PROCESS,
    Untranslated,
    clip,
    integer,
    number,
    one_of,
    ratio,
    text,
)
from esm2mega.config.scalars import shown

_STORE = "pfam"
"""Names the folder of the token stores that the printed command makes."""


def _length(source: Source) -> int:
    length = source.number("seq_length")
    if length is None:
        raise Untranslated("counts pieces of seq_length tokens, which the file does not give")
    return int(length)


def _micro(value: Any, source: Source) -> Settings:
    """Count tokens: a sample of that system is a pack of `seq_length` tokens, of one protein or several."""
    tokens = integer(value) * _length(source)
    found: Settings = {"train.micro_batch_tokens": tokens}
    if source.get("global_batch_size") is None:
        found["train.global_batch_tokens"] = tokens
    return found


def _global(value: Any, source: Source) -> Settings:
    return {"train.global_batch_tokens": integer(value) * _length(source)}


def _eval_batches(value: Any, source: Source) -> Settings:
    micro, total = source.number("micro_batch_size"), source.number("global_batch_size")
    if not micro:
        raise Untranslated("counts batches whose size the file does not give; data.valid is evaluated whole")
    return {"train.eval_batches": int(number(value) * (total or micro) // micro)}


def _decay(source: Source) -> float:
    steps = source.number("lr_decay_iters") or source.number("train_iters")
    if not steps:
        raise Untranslated("is a fraction of steps that the file does not give: set schedule.warmup_steps")
    return steps


def _warmup(value: Any, source: Source) -> Settings:
    return {"schedule.warmup_steps": round(number(value) * _decay(source))}


def _style(value: Any, source: Source) -> Settings:
    name = one_of({"linear": "linear", "cosine": "cosine", "constant": "constant"})(value)
    steps = source.number("lr_decay_iters") or source.number("train_iters")
    found: Settings = {"schedule.name": name}
    if name != "constant" and steps:
        found["schedule.decay_steps"] = int(steps)
    return found


def _min_lr(value: Any, source: Source) -> Settings:
    return {"schedule.min_lr_ratio": ratio(number(value), source.number("lr"))}


def _load(value: Any, source: Source) -> Settings:
    if value == source.get("save"):  # a run goes on in its directory
        return {}
    return {"init_from": text(value)}


def _data(value: Any, source: Source) -> Settings:
    if isinstance(value, list):
        raise Untranslated(
            "mixes several sets; make a store of each, and name them in data.train and data.weights"
        )
    shares = zip(("train", "valid", "test"), _shares(source), strict=True)
    return {f"data.{split}": f"{_STORE}/{split}" for split, share in shares if share}


def _shares(source: Source) -> list[int]:
    """Return the shares of the three splits; that system held proteins out also where it was not told to.

    Shares were any numbers there, and more than three of them were passed over; here they are whole.
    """
    given = text(source.get("split") or "969,30,1")
    words = given.split("," if "," in given else "/")[:3]
    shares = [Fraction(str(number(word))) for word in words] + [Fraction(0)] * (3 - len(words))
    whole = [int(share * math.lcm(*(share.denominator for share in shares))) for share in shares]
    if whole[0] <= 0 or min(whole) < 0 or max(whole) >= 10**15:
        raise Untranslated(
            f"--split {shown(given)} has other shares than train, valid and test can have; set data.*"
        )
    return whole


def _prepare_pfam(source: Source) -> list[str]:
    path = source.get("data_path")
    if not isinstance(path, str) or path.startswith(("<", "$")):
        return []
    try:
        shares = ",".join(map(str, _shares(source)))
    except Untranslated:
        return []
    words = ["--format", "megatron", "--split", shares]
    return [f"esm2mega prepare fasta {shlex.join([path, *words])} --out {_STORE}"]


def _finish_megatron(settings: Settings, source: Source) -> list[str]:
    hidden = settings.get("model.hidden_size")
    if hidden is not None:
        settings.setdefault("model.ffn_hidden_size", 4 * hidden)
    if source.get("no_bias_gelu_fusion") is None:
        settings.setdefault("model.activation", "gelu_tanh")
    if "data.max_seq_length" in settings:
        settings.setdefault("model.max_positions", settings["data.max_seq_length"])
    if source.get("global_batch_size") is None and "train.global_batch_tokens" in settings:
        return [OF_ONE_PROCESS]
    return []


_KERNELS = "a matter of kernels"

MEGATRON = Table(
    "ProteinLM",
    "options of `pretrain_tape.py`, which are those of Megatron-LM",
    rules=(
        key("num_layers", "model.num_layers", integer),
        key("hidden_size", "model.hidden_size", integer, "the feed-forward layers are four times as wide"),
        key("num_attention_heads", "model.num_attention_heads", integer),
        key("max_position_embeddings", "model.max_positions", integer),
        key("layernorm_epsilon", "model.layernorm_epsilon", number),
        key("hidden_dropout", "model.hidden_dropout", number),
        key("attention_dropout", "model.attention_dropout", number),
        key("init_method_std", "model.init_std", number),
        key("seq_length", "data.max_seq_length", integer),
        computed(
            "micro_batch_size",
            "train.micro_batch_tokens",
            _micro,
            "times the length: a sample there is a pack of so many tokens, of several proteins",
        ),
        computed("global_batch_size", "train.global_batch_tokens", _global, "times the length"),
        absent("rampup_batch_size", "the batch is the same in all steps"),
        key("train_iters", "train.max_steps", integer),
        absent("train_samples lr_decay_samples lr_warmup_samples", "runs and schedules are counted in steps"),
        key("lr", "optim.lr", number),
        computed("lr_decay_style", "schedule.name schedule.decay_steps", _style, ""),
        key("lr_decay_iters", "schedule.decay_steps", integer),
        computed("lr_warmup_fraction", "schedule.warmup_steps", _warmup, "times the steps of the decay"),
        key("lr_warmup_iters", "schedule.warmup_steps", integer),
        computed("min_lr", "schedule.min_lr_ratio", _min_lr, "divided by the peak rate"),
        same(
            "override_lr_scheduler use_checkpoint_lr_scheduler", "the schedule is that of the configuration"
        ),
        key("weight_decay", "optim.weight_decay", number),
        key("clip_grad", "optim.clip_grad", clip),
        computed("adam_beta1 adam_beta2", "optim.betas", betas("adam_beta1", "adam_beta2", (0.9, 0.999)), ""),
        key("adam_eps", "optim.eps", number),
        key("seed", "seed", integer),
        computed("fp16", "model.precision", switch({"model.precision": "fp16"}), "the switch is `fp16`"),
        key("initial_loss_scale", "optim.initial_loss_scale", number, "losses are scaled dynamically"),
        same(
            "loss_scale min_loss_scale loss_scale_window hysteresis",
            "losses are scaled dynamically",
        ),
        same(
            "fp32_residual_connection no_query_key_layer_scaling attention_softmax_in_fp32 fp32_allreduce "
            "fp16_lm_cross_entropy no_scaled_masked_softmax_fusion no_bias_dropout_fusion onnx_safe DDP_impl "
            "use_cpu_initialization make_vocab_size_divisible_by distribute_checkpointed_activations "
            "checkpoint_num_layers",
            _KERNELS,
        ),
        computed(
            "no_bias_gelu_fusion",
            "model.activation",
            switch({"model.activation": "gelu"}),
            "without the switch GELU was computed by tanh: `gelu_tanh`",
        ),
        computed("openai_gelu", "model.activation", switch({"model.activation": "gelu_tanh"}), ""),
        absent(
            "apply_residual_connection_post_layernorm",
            "`model.family` proteinbert_postln has LayerNorms after blocks",
        ),
        computed(
            "checkpoint_activations",
            "model.recompute",
            switch({"model.recompute": "full"}),
            "the switch is `full`",
        ),
        key("tensor_model_parallel_size model_parallel_size", "parallel.tensor_model_parallel_size", integer),
        key("pipeline_model_parallel_size", "parallel.pipeline_model_parallel_size", integer),
        elsewhere(
            "distributed_backend local_rank", "`torchrun` starts the processes; NCCL on GPUs, gloo on CPUs"
        ),
        key("save", "run_dir", text),
        computed(
            "load",
            "init_from",
            _load,
            "unless it is that of the run itself, which goes on where it was stopped",
        ),
        same("finetune no_load_optim no_load_rng", "`init_from` takes the weights alone"),
        absent("no_save_optim no_save_rng", "checkpoints are whole; there is no random state in them"),
        key("save_interval", "checkpoint.save_every", integer),
        key("eval_interval", "train.eval_every", integer),
        computed("eval_iters", "train.eval_batches", _eval_batches, "times the micro-batches of a step"),
        key("log_interval", "train.log_every", integer),
        key("exit_duration_in_mins", "train.max_minutes", number),
        absent("exit_interval", "`train.max_steps` ends a run"),
        computed(
            "tensorboard_dir",
            "logging.tensorboard",
            lambda value, _: {"logging.tensorboard": True},
            "files go to `run_dir`",
        ),
        computed(
            "data_path",
            "data.train data.valid data.test",
            _data,
            "the stores that `esm2mega prepare fasta` makes of it; `translate` prints the command",
        ),
        same("split", "goes into the command that `translate` prints"),
        same(
            "vocab_file merge_file tokenizer_type data_impl mmap_warmup",
            "the alphabet and the format are known",
        ),
        key("mask_prob", "data.mlm_probability", number),
        same("short_seq_prob num_workers", "proteins are packed whole, and packs built ahead"),
    ),
    habits=(
        Habit("model.family", "proteinbert_preln", "learned positions, LayerNorm before blocks"),
        Habit("data.crop", "start", "long proteins were cut at the end"),
    ),
    programs=("pretrain_tape.py", "pretrain_bert.py"),
    defaults={
        "pretrain_tape.py": {
            "layernorm_epsilon": "1e-5",
            "hidden_dropout": "0.1",
            "attention_dropout": "0.1",
            "lr_decay_style": "linear",
            "min_lr": "0.0",
            "adam_beta2": "0.999",
            "lr_warmup_iters": "0",
            "log_interval": "100",
            "eval_interval": "1000",
        }
    },
    prepare=_prepare_pfam,
    finish=_finish_megatron,
)

_HEAD: Settings = {"task.head": "proteinlm", "task.dropout": 0.0}

_TASKS: dict[str, Settings] = {
    "fluorescence": {"task.kind": "regression", **_HEAD},
    "stability": {"task.kind": "regression", **_HEAD},
    "remote_homology": {"task.kind": "classification", "task.num_classes": 1195, **_HEAD},
    "secondary_structure": {"task.kind": "token_classification", "task.num_classes": 3, **_HEAD},
    "contact_prediction": {"task.kind": "contact", "task.mask_column": "mask", **_HEAD, "task.dropout": 0.5},
    "masked_language_modeling": {},
}


def _task(value: Any, source: Source) -> Settings:
    return dict(one_of(_TASKS)(value))


def _prepare_tape(source: Source) -> list[str]:
    task, folder = source.get("task"), source.get("data_dir")
    if not task or task == "masked_language_modeling" or not isinstance(folder, str):
        return []
    return [f"esm2mega prepare tape {shlex.join([task, '--source', folder])} --out tape/{task}"]


def _run_dir(value: Any, source: Source) -> Settings:
    """Name the directory of the run as that system did: task, model, and a time or a name."""
    task, model = source.get("task") or "task", source.get("model_type") or "transformer"
    name = source.get("time_or_name") or "time"
    ending = "{time}" if name == "time" else name
    return {"run_dir": f"{text(value).rstrip('/')}/{source.get('exp_name') or f'{task}_{model}_{ending}'}"}


def _name(value: Any, source: Source) -> Settings:
    return {"checkpoint.resume": "never"} if value == "time" and not source.get("exp_name") else {}


def _epochs_only(key_here: str, unit: str = "steps") -> Any:
    def turn(value: Any, source: Source) -> Settings:
        raise Untranslated(f"counts epochs, {key_here} {unit}; set it with the length of an epoch in mind")

    return turn


def _finish_tape(settings: Settings, source: Source) -> list[str]:
    task = source.get("task")
    if task in _TASKS and _TASKS[task]:
        for split in ("train", "valid"):
            settings.setdefault(f"data.{split}", f"tape/{task}/{split}.csv")
    if "train.max_epochs" in settings:
        settings.pop("train.max_steps", None)
    return [
        "schedule.decay_steps: a run in epochs reaches 0 after 90 % of its steps; set them to change that"
    ]


TAPE = Table(
    "ProteinLM",
    "options of `tape_train.py` and `tape_eval.py`, which are those of TAPE",
    rules=(
        computed(
            "task",
            "task.kind task.head task.num_classes data.train data.valid",
            _task,
            "with the tables that `esm2mega prepare tape` makes; `translate` prints the command",
        ),
        same("model_type", "the model is that of the checkpoint", "transformer"),
        key("learning_rate", "optim.lr", number),
        key("batch_size", "train.global_batch_size", integer),
        same("gradient_accumulation_steps", "divides the batch, which `train.micro_batch_size` does"),
        key("num_train_epochs", "train.max_epochs", integer),
        key("warmup_steps", "schedule.warmup_steps", integer),
        key("max_grad_norm", "optim.clip_grad", clip),
        key("weight_decay", "optim.weight_decay", number),
        computed("fp16", "model.precision", switch({"model.precision": "fp16"}), "the switch is `fp16`"),
        same("loss_scale", "losses are scaled dynamically"),
        same("data_dir", "goes into the command that `translate` prints"),
        computed(
            "output_dir", "run_dir", _run_dir, "with the task, the model, and the name or time below it"
        ),
        computed(
            "time_or_name", "run_dir checkpoint.resume", _name, "a time is `{time}`, which needs `never`"
        ),
        same("exp_name", "ends `run_dir`"),
        key("from_pretrained", "init_from", text),
        same("resume_from_checkpoint", "a run goes on where it was stopped, with `checkpoint.resume`"),
        computed(
            "eval_freq", "", _epochs_only("train.eval_every"), "epochs there, `train.eval_every` steps here"
        ),
        computed("save_freq", "", _epochs_only("checkpoint.save_every"), "epochs there"),
        computed(
            "patience",
            "",
            _epochs_only("train.early_stopping.patience", "evaluations"),
            "epochs there, evaluations here: `train.early_stopping.patience`",
        ),
        key("num_log_iter", "train.log_every", integer),
        key("seed", "seed", integer),
        elsewhere("metrics", "`esm2mega evaluate` computes all metrics of a task"),
        elsewhere("split", "`esm2mega evaluate` takes the table of a split, with `--data`"),
        elsewhere(
            "nproc_per_node nnodes node_rank master_addr master_port local_rank",
            "`torchrun` starts the processes",
        ),
        same("force_save", "`esm2mega convert` needs no model of random weights"),
        absent("model_config_file vocab_file", "model and alphabet are those of the checkpoint"),
        same("tokenizer", "the tokens of TAPE are mapped to those of ESM-2", "iupac"),
        same("log_dir num_workers log_level debug no_cuda", "see `run_dir`, and `-v`"),
    ),
    habits=(
        Habit("optim.betas", [0.9, 0.999], "betas were 0.9 and 0.999"),
        Habit("optim.eps", 1e-6, "was the default of its optimizer"),
        Habit("schedule.name", "linear", "the rate fell linearly to 0"),
        Habit("schedule.min_lr_ratio", 0.0, "the rate fell linearly to 0"),
        Habit("data.too_long", "drop", "proteins of more than 512 residues were left out", "finetuning"),
        Habit("data.max_seq_length", 514, "proteins of more than 512 residues were left out", "finetuning"),
        Habit("task.scale_targets", False, "the numbers of a regression were not scaled", "finetuning"),
    ),
    programs=("tape_train.py", "tape_train_distributed.py", "tape_eval.py", "tape-train", "tape-eval"),
    joint="_",
    positional=("model_type", "task"),
    defaults={
        program: {
            "learning_rate": "1e-4",
            "batch_size": "1024",
            "num_train_epochs": "10",
            "warmup_steps": "10000",
            "max_grad_norm": "1.0",
            "weight_decay": "0.01",
            "num_log_iter": "20",
            "seed": "42",
            "output_dir": "./results",
            "data_dir": "./data",
            "time_or_name": "time",
        }
        for program in ("tape_train.py",)
    },
    prepare=_prepare_tape,
    finish=_finish_tape,
)

TABLES = (MEGATRON, TAPE)
