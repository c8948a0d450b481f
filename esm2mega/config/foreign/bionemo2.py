"""Lists the options of BioNeMo 2's programs, of which the keys of its files are in `bionemo2_files`."""

from __future__ import annotations

import shlex
from typing import Any

from esm2mega.config.foreign.rules import (
    Habit,
    Settings,
    Source,
    Table,
    absent,
    computed,
    elsewhere,
    key,
    same,
)
from esm2mega.config.foreign.values import (
    BATCHES_AHEAD,
    PRECISIONS,
    end_of_hold,
    integer,
    metric,
    number,
    one_of,
    resumed,
    text,
    truth,
    whole_split,
)

STORE = "uniref"
"""Names the folder of the token stores that the printed command makes."""

_INPUTS = ("train_cluster_path", "train_database_path", "valid_cluster_path", "valid_database_path")

MASKS = {"all_tokens": "all", "amino_acids_only": "amino_acids"}

WANDB = "a variable of Weights & Biases: WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS, WANDB_MODE=offline"

PADDING = "nothing is padded: proteins are packed"

_OVERLAP = "with `parallel.distributed_optimizer` gradients are reduced during the backward pass"


def prepare_from(section: str) -> Any:
    """Return the function that returns the command which makes token stores of the four files."""

    def prepare(source: Source) -> list[str]:
        paths = {name: source.get(f"{section}{name}") for name in _INPUTS}
        if None in (paths["train_cluster_path"], paths["train_database_path"]):
            return []
        words = [
            word
            for name, path in paths.items()
            if path is not None
            for word in (f"--{name.replace('_', '-')}", str(path))
        ]
        return [f"esm2mega prepare uniref {shlex.join(words)} --out {STORE}"]

    return prepare


def _store(split: str) -> Any:
    return lambda value, source: {f"data.{split}": f"{STORE}/{split}"}


def inputs(section: str) -> list[Any]:
    """Make the rules for the four files of a training on UniRef."""
    note = "the store that `esm2mega prepare uniref` makes of the four files; `translate` prints the command"
    return [
        computed(f"{section}train_cluster_path", "data.train", _store("train"), note),
        computed(f"{section}valid_cluster_path", "data.valid", _store("valid"), note),
        same(
            f"{section}train_database_path {section}valid_database_path",
            "go into the command that `translate` prints",
        ),
    ]


def _interval(value: Any, source: Source) -> Settings:
    return {"train.eval_every": integer(value), "checkpoint.save_every": integer(value)}


def held(warmup: float, steps: float) -> Settings:
    """Return the schedule: down to a tenth of the peak on the line to 0 at the last step, then flat."""
    return {
        "schedule.name": "linear",
        "schedule.warmup_steps": int(warmup),
        "schedule.decay_steps": end_of_hold(warmup, steps, 0.1),
        "schedule.min_lr_ratio": 0.1,
    }


def _steps(value: Any, source: Source) -> Settings:
    return {} if source.get("early_stop_on_step") else {"train.max_steps": integer(value)}


def _warmup(value: Any, source: Source) -> Settings:
    steps = source.number("scheduler_num_steps") or source.number("num_steps") or 500_000
    return held(number(value), steps)


def _config_class(value: Any, source: Source) -> Settings:
    """Return the task: the class says whether labels are of proteins or residues, the type the rest."""
    heads = {"esm2finetuneseqconfig": "mlp", "esm2finetunetokenconfig": "cnn", "esm2config": ""}
    head = one_of(heads)(value)
    if not head:
        return {}
    if head == "cnn":
        return {"task.kind": "token_classification", "task.head": head}
    return {"task.kind": one_of(_KINDS)(source.get("task_type") or "regression"), "task.head": head}


_KINDS = {"regression": "regression", "classification": "classification"}


def _task_type(value: Any, source: Source) -> Settings:
    kind: str = one_of(_KINDS)(value)
    if text(source.get("config_class") or "").lower() == "esm2finetunetokenconfig":
        return {}
    return {"task.kind": kind}


def _of_head(head: str, ours: str, convert: Any) -> Any:
    """Return the turn of an option that counts with one of the two heads alone."""

    def turn(value: Any, source: Source) -> Settings:
        is_cnn = str(source.get("config_class") or "").lower() == "esm2finetunetokenconfig"
        return {ours: convert(value)} if is_cnn == (head == "cnn") else {}

    return turn


def _number_of_classes(head: str) -> Any:
    def turn(value: Any, source: Source) -> Settings:
        if head == "mlp" and source.get("task_type") != "classification":
            return {}
        return _of_head(head, "task.num_classes", integer)(value, source)

    return turn


def _scaled_layer(value: Any, source: Source) -> Settings:
    name = text(value)
    pattern = "head.*" if name in ("regression_head", "classification_head") else f"{name}.*"
    factor = source.number("lr_multiplier")
    return {"finetune.lr_scale": {pattern: 1.0 if factor is None else factor}}


def _adapters(value: Any, source: Source) -> Settings:
    if not truth(value):
        return {}
    # The linears and sizes that this system gave adapters to, without options for them.
    targets = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    return {"finetune.mode": "lora", "lora.rank": 32, "lora.alpha": 32, "lora.target_modules": targets}


def _frozen(value: Any, source: Source) -> Settings:
    return {"finetune.mode": "frozen"} if truth(value) and not source.get("lora_finetune") else {}


def wandb(value: Any, source: Source) -> Settings:
    """Return the settings of Weights & Biases, which was used where a project was named."""
    return {"logging.wandb": True, "logging.wandb_project": text(value)}


def run_dir(experiment: str) -> Any:
    """Return the turn of the folder of results, below which a run is named by the key `experiment`."""

    def turn(value: Any, source: Source) -> Settings:
        name = source.get(experiment)
        return {"run_dir": f"{text(value).rstrip('/')}/{name}" if name else text(value)}

    return turn


def _finish_options(settings: Settings, source: Source) -> list[str]:
    if "task.kind" in settings:
        for name in ("name", "warmup_steps", "decay_steps", "min_lr_ratio"):
            settings.pop(f"schedule.{name}", None)
        settings |= {"schedule.name": "constant", "schedule.warmup_steps": 0}
        if "train.max_epochs" in settings and source.get("max_epochs") != "500000":
            settings.pop("train.max_steps", None)
        else:
            settings.pop("train.max_epochs", None)
        return []
    if settings.get("init_from") is None:
        settings.setdefault("model.activation", "gelu_tanh")
        return ["model.activation=gelu_tanh: BioNeMo 2 computes the GELU of the feed-forward layers by tanh"]
    return []


_TRAIN_DEFAULTS = {
    "num_steps": "500000",
    "warmup_steps": "2000",
    "lr": "4e-4",
    "micro_batch_size": "64",
    "accumulate_grad_batches": "1",
    "precision": "bf16-mixed",
    "max_seq_length": "1024",
    "val_check_interval": "10000",
    "num_layers": "33",
    "hidden_size": "1280",
    "num_attention_heads": "20",
    "ffn_hidden_size": "5120",
    "random_mask_strategy": "all_tokens",
    "save_top_k": "2",
    "result_dir": "./results",
    "experiment_name": "esm2",
}

_FINETUNE_DEFAULTS = {
    "config_class": "ESM2FineTuneSeqConfig",
    "task_type": "regression",
    "label_column": "labels",
    "mlp_ft_dropout": "0.25",
    "mlp_hidden_size": "256",
    "cnn_dropout": "0.25",
    "cnn_hidden_size": "32",
    "num_steps": "500000",
    "max_epochs": "500000",
    "lr": "4e-4",
    "micro_batch_size": "64",
    "accumulate_grad_batches": "1",
    "precision": "bf16-mixed",
    "max_seq_length": "512",
    "val_check_interval": "20",
    "log_every_n_steps": "1",
    "save_top_k": "2",
    "experiment_name": "esm2-finetune",
}

OPTIONS = Table(
    "BioNeMo 2",
    "options of `train_esm2`, `finetune_esm2` and `infer_esm2`",
    rules=(
        *inputs(""),
        key("train_data_path", "data.train", text),
        key("valid_data_path", "data.valid", text),
        computed("num_steps", "train.max_steps", _steps, "unless `early_stop_on_step` is given"),
        key("max_epochs", "train.max_epochs", integer),
        key("early_stop_on_step", "train.max_steps", integer, "the schedule stays that of all steps"),
        computed(
            "warmup_steps",
            "schedule.warmup_steps schedule.name schedule.decay_steps schedule.min_lr_ratio",
            _warmup,
            "down to a tenth of the peak on the line from the end of the warmup to 0 at the last step, "
            "then flat; "
            "`finetune_esm2` has a constant rate",
        ),
        same("scheduler_num_steps", "goes into `schedule.decay_steps`"),
        key("lr", "optim.lr", number),
        key(
            "weight_decay",
            "optim.weight_decay",
            number,
            "was ignored there, and 0.01 used",
            remark="is heeded here; there it was ignored, and 0.01 used",
        ),
        key("micro_batch_size", "train.micro_batch_size", integer),
        key("accumulate_grad_batches", "train.accumulate_grad_batches", integer),
        key("precision", "model.precision", one_of(PRECISIONS)),
        key("max_seq_length", "data.max_seq_length", integer),
        same("min_seq_length", PADDING),
        key("random_mask_strategy", "data.random_residues", one_of(MASKS), "`all_tokens` is `all`"),
        computed("val_check_interval", "train.eval_every checkpoint.save_every", _interval, ""),
        key("limit_val_batches", "train.eval_batches", whole_split, "1.0, the whole split, is 0 here"),
        same("limit_test_batches", "`data.test` is evaluated whole, once, at the end"),
        key("log_every_n_steps", "train.log_every", integer),
        same("create_tflops_callback", "the log has the throughput of every record"),
        key("create_tensorboard_logger", "logging.tensorboard", truth),
        elsewhere("num_gpus", "`torchrun --nproc-per-node` starts the processes of a machine"),
        elsewhere("num_nodes", "`torchrun` or Slurm starts several machines, see docs/multi-node.md"),
        key("tensor_model_parallel_size", "parallel.tensor_model_parallel_size", integer),
        key("pipeline_model_parallel_size", "parallel.pipeline_model_parallel_size", integer),
        same("decoder_first_pipeline_num_layers", "uneven stages are computed from the number of layers"),
        same(
            "overlap_grad_reduce no_overlap_grad_reduce overlap_param_gather no_overlap_param_gather "
            "average_in_collective no_average_in_collective grad_reduce_in_fp32",
            _OVERLAP + "; those of bf16 models in fp32",
        ),
        key("num_layers", "model.num_layers", integer, "the four dimensions of a preset are `model.size`"),
        key("hidden_size", "model.hidden_size", integer),
        key("num_attention_heads", "model.num_attention_heads", integer),
        key("ffn_hidden_size", "model.ffn_hidden_size", integer),
        same("biobert_spec_option", "`model.layer_spec` takes Transformer Engine where it is installed"),
        key("restore_from_checkpoint_path nemo1_init_path", "init_from", text),
        elsewhere("checkpoint_path", "is the argument CHECKPOINT of `esm2mega embed` and `predict`"),
        elsewhere("data_path", "is the argument INPUT of `esm2mega embed` and `predict`"),
        elsewhere("results_path", "is the option `--out` of `esm2mega embed` and `predict`"),
        elsewhere(
            "include_hiddens include_embeddings include_logits include_input_ids",
            "`--include residue,pooled,logits` of `esm2mega embed`; rows have ids, in input order",
        ),
        same("prediction_interval", "outputs are written as they are computed"),
        same(
            "initial_ckpt_skip_keys_with_these_prefixes",
            "the head of a checkpoint is taken with `finetune.load_head` alone; see `finetune.skip`",
        ),
        key("resume_if_exists", "checkpoint.resume", resumed, "the default here"),
        computed(
            "result_dir", "run_dir", run_dir("experiment_name"), "with the name of the experiment below it"
        ),
        same("experiment_name", "ends `run_dir`"),
        key("save_top_k", "checkpoint.keep_best", integer),
        same(
            "save_last_checkpoint no_save_last_checkpoint save_best_checkpoint no_save_best_checkpoint "
            "metric_tracker",
            "the newest checkpoints and the best ones are kept: `checkpoint.keep_last`, "
            "`checkpoint.keep_best`",
        ),
        key("metric_to_monitor_for_checkpoints", "checkpoint.best_metric", metric),
        key(
            "no_ckpt_async_save",
            "checkpoint.async_save",
            lambda value: not truth(value),
            "the default here",
        ),
        absent("disable_checkpointing", "a run always writes its last checkpoint"),
        same("num_dataset_workers no_persistent_workers no_pin_memory", BATCHES_AHEAD),
        computed("wandb_project", "logging.wandb_project logging.wandb", wandb, ""),
        elsewhere(
            "wandb_entity wandb_tags wandb_group wandb_job_type wandb_id wandb_anonymous wandb_log_model "
            "wandb_offline",
            WANDB,
        ),
        absent(
            "nsys_profiling nsys_start_step nsys_end_step nsys_ranks", "profiles are taken with nsys itself"
        ),
        computed("config_class", "task.kind task.head", _config_class, "the head for residues is `cnn`"),
        same("dataset_class", "`task.kind` says whether labels are of proteins or of residues"),
        computed("task_type", "task.kind", _task_type, ""),
        key("label_column", "task.target_columns", lambda value: [text(value)]),
        key("labels_mask_column", "task.mask_column", text),
        computed("mlp_ft_dropout", "task.dropout", _of_head("mlp", "task.dropout", number), ""),
        computed("cnn_dropout", "task.dropout", _of_head("cnn", "task.dropout", number), ""),
        computed("mlp_hidden_size", "task.hidden_size", _of_head("mlp", "task.hidden_size", integer), ""),
        computed("cnn_hidden_size", "task.hidden_size", _of_head("cnn", "task.hidden_size", integer), ""),
        computed("mlp_target_size", "task.num_classes", _number_of_classes("mlp"), "of a classification"),
        computed("cnn_num_classes", "task.num_classes", _number_of_classes("cnn"), ""),
        computed("encoder_frozen", "finetune.mode", _frozen, ""),
        computed("scale_lr_layer", "finetune.lr_scale", _scaled_layer, "with the multiplier as factor"),
        same("lr_multiplier", "goes into `finetune.lr_scale`"),
        computed(
            "lora_finetune",
            "finetune.mode lora.rank lora.alpha lora.target_modules",
            _adapters,
            "rank and alpha were 32, without options",
        ),
        key("lora_checkpoint_path", "init_from", text, "a checkpoint with adapters"),
        elsewhere(
            "config model_config_cls data_config_cls", "`esm2mega translate` reads the JSON file itself"
        ),
        elsewhere("recipe dest", "the shipped configurations, such as `pretrain_esm2_650M`, take its place"),
    ),
    habits=(
        Habit("optim.betas", [0.9, 0.98], "betas were 0.9 and 0.98"),
        Habit("data.too_long", "crop", "labelled proteins above the length were cut", "finetuning"),
        Habit("data.crop", "start", "labelled proteins above the length were cut at the end", "finetuning"),
        Habit(
            "data.sequence_column", "sequences", "the column was named sequences, or sequence", "finetuning"
        ),
        Habit("task.scale_targets", False, "the numbers of a regression were not scaled", "finetuning"),
    ),
    programs=("train_esm2", "esm2_pretrain.py", "finetune_esm2", "infer_esm2", "bionemo-esm2-train"),
    defaults={
        "": {},
        "train_esm2": _TRAIN_DEFAULTS,
        "esm2_pretrain.py": _TRAIN_DEFAULTS,
        "finetune_esm2": _FINETUNE_DEFAULTS,
    },
    processes=("num_gpus", "num_nodes"),
    prepare=prepare_from(""),
    finish=_finish_options,
)

TABLES = (OPTIONS,)
