"""Lists the keys of ESM2-FA's YAML file, and the arguments of Hugging Face's Trainer under it."""

from __future__ import annotations

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
    BATCHES_AHEAD,
    OF_ONE_PROCESS,
    ONLY_ADAM,
    PRECISIONS,
    Untranslated,
    clip,
    integer,
    metric,
    model_of,
    number,
    one_of,
    text,
    texts,
    truth,
)


def _tokens(value: Any, source: Source) -> Settings:
    accumulated = source.number("training.gradient_accumulation_steps")
    budget = integer(value)
    return {
        "train.micro_batch_tokens": budget,
        "train.global_batch_tokens": budget * int(1 if accumulated is None else accumulated),
    }


def _strategy(value: Any, source: Source) -> Settings:
    if text(value) == "epoch":
        raise Untranslated("evaluations are counted in steps: set train.eval_every")
    return {"train.eval_every": 0} if value == "no" else {}


def _early(ours: str, convert: Any) -> Any:
    def turn(value: Any, source: Source) -> Settings:
        enabled = source.get("training.early_stopping.enabled")
        return {ours: convert(value)} if enabled and truth(enabled) else {}

    return turn


FILE = Table(
    "ESM2-FA",
    "`config.yaml`",
    rules=(
        computed(
            "model.model_name",
            "model.size model.from",
            lambda value, _: model_of(value),
            "the architecture alone; the published names are presets, others `model.from`",
        ),
        key("model.max_position_embeddings", "data.max_seq_length", integer),
        computed(
            "model.max_batch_size",
            "train.micro_batch_tokens train.global_batch_tokens",
            _tokens,
            "tokens of a batch there too; times `gradient_accumulation_steps`, and times the processes, "
            "they are those of a step",
            remark=OF_ONE_PROCESS,
        ),
        same("training.gradient_accumulation_steps", "goes into `train.global_batch_tokens`"),
        key(
            "model.use_fa",
            "model.attention_backend",
            lambda value: "auto" if truth(value) else "sdpa",
            "false is `sdpa`",
        ),
        key("model.hidden_dropout_prob", "model.hidden_dropout", number),
        key("model.attention_probs_dropout_prob", "model.attention_dropout", number),
        computed(
            "training.evaluation_strategy training.eval_strategy",
            "train.eval_every",
            _strategy,
            "steps alone",
        ),
        key("training.learning_rate", "optim.lr", number),
        computed(
            "training.optimizer.beta_1 training.optimizer.beta_2",
            "optim.betas",
            betas("training.optimizer.beta_1", "training.optimizer.beta_2", (0.9, 0.95)),
            "",
        ),
        key("training.optimizer.epsilon", "optim.eps", number),
        key("training.optimizer.weight_decay", "optim.weight_decay", number),
        same("training.optimizer.fused", "a matter of kernels"),
        key("training.gradient_clipping", "optim.clip_grad", clip),
        computed(
            "training.lr_scheduler",
            "schedule.name schedule.min_lr_ratio",
            lambda value, _: {
                **one_of({"cosine": {"schedule.name": "cosine_plateau", "schedule.min_lr_ratio": 0.1}})(value)
            },
            "its cosine ends at a tenth of the peak, and stays: `cosine_plateau`",
        ),
        key("training.schedule_steps", "schedule.decay_steps", integer),
        key("training.warmup_steps", "schedule.warmup_steps", integer),
        key("training.max_steps", "train.max_steps", integer),
        key("training.mlm_probability", "data.mlm_probability", number),
        key("training.logging_steps", "train.log_every", integer),
        key("training.eval_steps", "train.eval_every", integer),
        key("training.save_steps", "checkpoint.save_every", integer),
        key("training.save_total_limit", "checkpoint.keep_last", integer),
        key("training.output_dir", "run_dir", text),
        same("training.load_best_model_at_end", "the best checkpoint is named RUN@best"),
        key("training.metric_for_best_model", "checkpoint.best_metric", metric),
        same("training.greater_is_better", "known from the metric"),
        same("training.early_stopping.enabled", "`train.early_stopping.patience` above 0"),
        computed(
            "training.early_stopping.patience",
            "train.early_stopping.patience",
            _early("train.early_stopping.patience", integer),
            "",
        ),
        computed(
            "training.early_stopping.threshold",
            "train.early_stopping.min_delta",
            _early("train.early_stopping.min_delta", number),
            "",
        ),
        key("training.mixed_precision", "model.precision", one_of(PRECISIONS)),
        same(
            "training.dataloader_num_workers training.dataloader_prefetch_factor "
            "training.dataloader_pin_memory",
            BATCHES_AHEAD,
        ),
        key("training.seed", "seed", integer),
        elsewhere("training.eval_only", "`esm2mega evaluate` measures a checkpoint"),
        same(
            "data.chunk_size data.default_shard_size",
            "`esm2mega prepare fasta` needs no sizes of windows or shards",
        ),
    ),
    habits=(
        Habit("data.crop", "chunk", "long proteins were cut into pieces of equal length"),
        Habit("data.random_residues", "all", "random tokens were of the whole vocabulary"),
    ),
)

PROGRAM = Table(
    "ESM2-FA",
    "options of `train.py` and `data_processing.py`",
    rules=(
        key("train_dir", "data.train", text),
        key("val_dir", "data.valid", text),
        elsewhere("config", "`esm2mega translate` reads the YAML file itself"),
        elsewhere("eval_only", "`esm2mega evaluate` measures a checkpoint"),
        elsewhere("input_fasta", "is the argument INPUT of `esm2mega prepare fasta`"),
        elsewhere("output_dir", "is the option `--out` of `esm2mega prepare fasta`"),
        key(
            "max_aa_length",
            "data.max_seq_length",
            lambda value: integer(value) + 2,
            "residues there; tokens, with `<cls>` and `<eos>`, here",
        ),
        same("chunk_size shard_size", "stores need no sizes of windows or shards"),
    ),
    programs=("train.py", "data_processing.py"),
    joint="_",
)


def _steps(source: Source) -> float | None:
    steps = source.number("max_steps")
    return steps if steps is not None and steps > 0 else None


def _max_steps(value: Any, source: Source) -> Settings:
    return {"train.max_steps": integer(value)} if number(value) > 0 else {}


def _epochs(value: Any, source: Source) -> Settings:
    return {} if _steps(source) else {"train.max_epochs": integer(value)}


def _warmup_ratio(value: Any, source: Source) -> Settings:
    share, steps = number(value), _steps(source)
    if not share:
        return {}
    if steps is None:
        raise Untranslated("is a fraction of steps that the file does not give: set schedule.warmup_steps")
    return {"schedule.warmup_steps": round(share * steps)}


def _scheduler(value: Any, source: Source) -> Settings:
    styles = {
        "linear": "linear",
        "cosine": "cosine",
        "constant": "constant",
        "constant_with_warmup": "constant",
    }
    name = one_of(styles)(value)
    found: Settings = {"schedule.name": name}
    if name != "constant":
        found["schedule.min_lr_ratio"] = 0.0
        if (steps := _steps(source)) is not None:
            found["schedule.decay_steps"] = int(steps)
    return found


def _resume(value: Any, source: Source) -> Settings:
    try:
        return {"checkpoint.resume": "auto"} if truth(value) else {}
    except Untranslated:
        return {"checkpoint.resume": text(value)}


def _loggers(value: Any, source: Source) -> Settings:
    names = set(texts(value)) - {"none", "all"}
    if names - {"wandb", "tensorboard"}:
        raise Untranslated(
            "log.jsonl, TensorBoard and Weights & Biases are written: logging.tensorboard, logging.wandb"
        )
    return {f"logging.{name}": True for name in sorted(names)}


TRAINER = Table(
    "Hugging Face Trainer",
    "`TrainingArguments`, in a YAML or JSON file or as options",
    rules=(
        key("output_dir", "run_dir", text),
        key("per_device_train_batch_size", "train.micro_batch_size", integer),
        key("gradient_accumulation_steps", "train.accumulate_grad_batches", integer),
        same("per_device_eval_batch_size eval_accumulation_steps", "evaluations take the packs of training"),
        computed("max_steps", "train.max_steps", _max_steps, "-1 there: epochs decide"),
        computed("num_train_epochs", "train.max_epochs", _epochs, ""),
        key("learning_rate", "optim.lr", number),
        key("weight_decay", "optim.weight_decay", number),
        computed("adam_beta1 adam_beta2", "optim.betas", betas("adam_beta1", "adam_beta2", (0.9, 0.999)), ""),
        key("adam_epsilon", "optim.eps", number),
        key("max_grad_norm", "optim.clip_grad", clip),
        key("warmup_steps", "schedule.warmup_steps", integer),
        computed("warmup_ratio", "schedule.warmup_steps", _warmup_ratio, "times the steps"),
        computed(
            "lr_scheduler_type",
            "schedule.name schedule.min_lr_ratio schedule.decay_steps",
            _scheduler,
            "linear and cosine end at 0 with the last step",
        ),
        key("logging_steps", "train.log_every", integer),
        computed("eval_strategy evaluation_strategy", "train.eval_every", _strategy, "steps alone"),
        key("eval_steps", "train.eval_every", integer),
        same("save_strategy", "`checkpoint.save_every` counts steps", "steps no"),
        key("save_steps", "checkpoint.save_every", integer),
        key("save_total_limit", "checkpoint.keep_last", integer),
        same("load_best_model_at_end", "the best checkpoint is named RUN@best"),
        key("metric_for_best_model", "checkpoint.best_metric", metric),
        same("greater_is_better", "known from the metric"),
        computed("bf16", "model.precision", switch({"model.precision": "bf16"}), "true is `bf16`"),
        computed("fp16", "model.precision", switch({"model.precision": "fp16"}), "true is `fp16`"),
        key("seed", "seed", integer),
        same("data_seed", "one `seed` decides weights, order and masks"),
        computed(
            "gradient_checkpointing",
            "model.recompute",
            switch({"model.recompute": "full"}),
            "true is `full`",
        ),
        computed(
            "resume_from_checkpoint",
            "checkpoint.resume",
            _resume,
            "true is `auto`, the default; a directory is that of one of our checkpoints",
        ),
        same("overwrite_output_dir", "a run goes on in its directory; see `checkpoint.resume`"),
        computed("report_to", "logging.wandb logging.tensorboard", _loggers, ""),
        key("run_name", "logging.wandb_run_name", text),
        same("logging_dir", "TensorBoard files are written to `run_dir`"),
        same("dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor", BATCHES_AHEAD),
        same(
            "optim",
            ONLY_ADAM,
            "adamw_torch adamw_torch_fused adamw_hf",
        ),
        elsewhere("local_rank ddp_backend", "`torchrun` starts the processes"),
        absent("deepspeed fsdp", "`parallel.distributed_optimizer` shards the state of the optimizer"),
        absent("push_to_hub hub_model_id", "`esm2mega convert` writes a directory of Hugging Face"),
    ),
    habits=(
        Habit("schedule.name", "linear", "the rate fell to 0"),
        Habit("schedule.min_lr_ratio", 0.0, "the rate fell to 0"),
        Habit("schedule.warmup_steps", 0, "there was no warmup"),
        Habit("optim.lr", 5e-5, "was the default"),
        Habit("optim.betas", [0.9, 0.999], "were the defaults"),
        Habit("optim.weight_decay", 0.0, "was the default"),
    ),
    programs=("run_mlm.py",),
    joint="_",
)

TABLES = (FILE, PROGRAM, TRAINER)
