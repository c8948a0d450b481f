"""Lists the keys of BioNeMo 2's files: JSON of `bionemo-esm2-recipe`, and Hydra of `esm2_native_te`.

The latter recipe trains Hugging Face's form of the model with Transformer Engine.
"""

from __future__ import annotations

from typing import Any

from esm2mega.config.foreign.bionemo2 import (
    MASKS,
    PADDING,
    STORE,
    WANDB,
    held,
    inputs,
    prepare_from,
    run_dir,
    wandb,
)
from esm2mega.config.foreign.rules import (
    Habit,
    Settings,
    Source,
    Table,
    computed,
    elsewhere,
    key,
    same,
    switch,
)
from esm2mega.config.foreign.values import (
    BATCHES_AHEAD,
    ONLY_ADAM,
    PRECISIONS,
    Untranslated,
    integer,
    metric,
    model_of,
    next_version,
    number,
    numbers,
    one_of,
    resumed,
    text,
    truth,
    whole_split,
)


def _recipe_warmup(value: Any, source: Source) -> Settings:
    if source.get("optim_config.lr_scheduler") not in (None, "warmup_anneal"):
        return {"schedule.warmup_steps": integer(value)}
    steps = source.number("optim_config.max_steps") or source.number("training_config.max_steps")
    return held(number(value), steps or 500_000)


def _recipe_schedule(value: Any, source: Source) -> Settings:
    if text(value) != "warmup_anneal":
        raise Untranslated(
            "its cosine begins and holds by fractions of the run; set schedule.name and its steps"
        )
    return {"schedule.name": "linear"}


RECIPE = Table(
    "BioNeMo 2",
    "JSON or YAML files of `bionemo-esm2-recipe`",
    rules=(
        *inputs("data_config."),
        key("data_config.micro_batch_size", "train.micro_batch_size", integer),
        key("data_config.max_seq_length", "data.max_seq_length", integer),
        key(
            "data_config.random_mask_strategy",
            "data.random_residues",
            one_of(MASKS),
            "`all_tokens` is `all`",
        ),
        same("data_config.min_seq_length data_config.seq_length", PADDING),
        same(
            "data_config.num_dataset_workers",
            BATCHES_AHEAD,
        ),
        same("data_config.result_dir", "see `experiment_config.result_dir`"),
        key("parallel_config.tensor_model_parallel_size", "parallel.tensor_model_parallel_size", integer),
        key("parallel_config.pipeline_model_parallel_size", "parallel.pipeline_model_parallel_size", integer),
        key("parallel_config.accumulate_grad_batches", "train.accumulate_grad_batches", integer),
        key(
            "parallel_config.use_distributed_optimizer optim_config.use_distributed_optimizer",
            "parallel.distributed_optimizer",
            truth,
        ),
        same("parallel_config.ddp", "data parallelism is that of megatron-core", "megatron"),
        same("parallel_config.remove_unused_parameters", "there are none"),
        elsewhere(
            "parallel_config.num_devices", "`torchrun --nproc-per-node` starts the processes of a machine"
        ),
        elsewhere(
            "parallel_config.num_nodes", "`torchrun` or Slurm starts several machines, see docs/multi-node.md"
        ),
        key("training_config.max_steps", "train.max_steps", integer),
        key("training_config.limit_val_batches", "train.eval_batches", whole_split),
        key("training_config.val_check_interval", "train.eval_every", integer),
        key("training_config.precision", "model.precision", one_of(PRECISIONS)),
        same(
            "training_config.accelerator training_config.gc_interval training_config.include_perplexity "
            "training_config.log_train_ppl training_config.log_val_ppl training_config.enable_checkpointing",
            "perplexities are always logged, checkpoints always written",
        ),
        key(
            "bionemo_model_config.num_layers", "model.num_layers", integer, "four dimensions, or `model.size`"
        ),
        key("bionemo_model_config.hidden_size", "model.hidden_size", integer),
        key("bionemo_model_config.ffn_hidden_size", "model.ffn_hidden_size", integer),
        key("bionemo_model_config.num_attention_heads", "model.num_attention_heads", integer),
        key("bionemo_model_config.hidden_dropout", "model.hidden_dropout", number),
        key("bionemo_model_config.attention_dropout", "model.attention_dropout", number),
        key("bionemo_model_config.init_method_std", "model.init_std", number),
        key("bionemo_model_config.layernorm_epsilon", "model.layernorm_epsilon", number),
        key(
            "bionemo_model_config.bias_activation_fusion",
            "model.activation",
            lambda value: "gelu_tanh" if truth(value) else "gelu",
            "true is `gelu_tanh`",
        ),
        same("bionemo_model_config.activation_func", "GELU is the only activation", "gelu"),
        key("bionemo_model_config.initial_ckpt_path bionemo_model_config.nemo1_ckpt_path", "init_from", text),
        same("bionemo_model_config.token_dropout", "ESM-2 has token dropout", "true"),
        same(
            "bionemo_model_config.share_embeddings_and_output_weights", "the decoder of ESM-2 is tied", "true"
        ),
        same(
            "bionemo_model_config.qk_layernorm bionemo_model_config.layernorm_zero_centered_gamma "
            "bionemo_model_config.apply_residual_connection_post_layernorm",
            "not part of ESM-2",
            "false",
        ),
        same(
            "bionemo_model_config.*",
            "as in ESM-2, or a matter of their kernels",
        ),
        key("optim_config.lr", "optim.lr", number),
        key("optim_config.adam_eps", "optim.eps", number),
        key("optim_config.weight_decay", "optim.weight_decay", number),
        same("optim_config.optimizer", ONLY_ADAM, "adam"),
        computed(
            "optim_config.lr_scheduler", "schedule.name", _recipe_schedule, "`warmup_anneal` is `linear`"
        ),
        computed(
            "optim_config.warmup_steps",
            "schedule.warmup_steps schedule.decay_steps schedule.min_lr_ratio",
            _recipe_warmup,
            "with the end of the decay, as for the option",
        ),
        same(
            "optim_config.max_steps optim_config.interval optim_config.monitor optim_config.sgd_momentum "
            "optim_config.cosine_rampup_frac optim_config.cosine_hold_frac",
            "go into the schedule, or belong to what is not in use",
        ),
        computed(
            "experiment_config.result_dir",
            "run_dir",
            run_dir("experiment_config.experiment_name"),
            "with the experiment's name below it",
        ),
        same("experiment_config.experiment_name", "ends `run_dir`"),
        key("experiment_config.save_every_n_steps", "checkpoint.save_every", integer),
        key("experiment_config.restore_from_checkpoint_path", "init_from", text),
        key("experiment_config.save_top_k", "checkpoint.keep_best", integer),
        key("experiment_config.metric_to_monitor_for_checkpoints", "checkpoint.best_metric", metric),
        key("experiment_config.create_tensorboard_logger", "logging.tensorboard", truth),
        same(
            "experiment_config.save_last_checkpoint experiment_config.create_checkpoint_callback",
            "the newest checkpoints are always kept: `checkpoint.keep_last`",
        ),
        computed("wandb_config.project", "logging.wandb_project logging.wandb", wandb, ""),
        elsewhere("wandb_config.*", WANDB),
    ),
    habits=(Habit("optim.betas", [0.9, 0.98], "betas were 0.9 and 0.98"),),
    processes=("parallel_config.num_devices", "parallel_config.num_nodes"),
    prepare=prepare_from("data_config."),
)


def _native_schedule(value: Any, source: Source) -> Settings:
    return {
        "schedule.name": "linear",
        "schedule.decay_steps": integer(value) * 9 // 10,
        "schedule.min_lr_ratio": 0.1,
    }


def _native_data(value: Any, source: Source) -> Settings:
    return {"data.train": f"{STORE}/train"}


def _native_prepare(source: Source) -> list[str]:
    if source.get("dataset.load_dataset_kwargs.path") is None:
        return []
    return [f"esm2mega prepare uniref --table DIR_OF_PARQUET_FILES --out {STORE}"]


def _native_finish(settings: Settings, source: Source) -> list[str]:
    next_version(settings)
    return []


NATIVE = Table(
    "BioNeMo 2",
    "Hydra files of the recipe `esm2_native_te`",
    rules=(
        computed(
            "config_name_or_path model_tag",
            "model.size model.from",
            lambda value, _: model_of(value),
            "the published names are presets, others `model.from`",
        ),
        key("num_train_steps", "train.max_steps", integer),
        key("grad_acc_steps", "train.accumulate_grad_batches", integer),
        key("dataset.micro_batch_size", "train.micro_batch_size", integer),
        key("dataset.max_seq_length", "data.max_seq_length", integer),
        key("dataset.mlm_probability", "data.mlm_probability", number),
        computed(
            "dataset.load_dataset_kwargs.path",
            "data.train",
            _native_data,
            "download the Parquet files; `esm2mega prepare uniref --table` makes the store",
        ),
        same(
            "dataset.load_dataset_kwargs.* dataset.num_workers dataset.tokenizer_name "
            "dataset.tokenizer_revision "
            "dataset.use_stateful_dataloader",
            "sample k is computed from the seed and k; the alphabet is that of ESM-2",
        ),
        same("use_sequence_packing", PADDING),
        computed(
            "use_te",
            "model.layer_spec model.activation",
            switch({"model.layer_spec": "te", "model.activation": "gelu_tanh"}),
            "its GELU is computed by tanh",
        ),
        key("cp_size", "parallel.context_parallel_size", integer),
        same(
            "fp8_config.enabled fp4_config.enabled quant_stats_config.enabled",
            "`model.fp8` and `model.fp8_recipe` set FP8 for the linears of Transformer Engine's layers",
            "false",
        ),
        same(
            "fp8_config.* fp4_config.* quant_stats_config.* fp8_layers fp4_layers bf16_baseline_file "
            "use_meta_device use_torch_compile use_fp32_master_weights fully_shard_kwargs.* config_kwargs",
            "belongs to that recipe's kernels and sharding; here see the section `parallel`",
        ),
        key("adamw_kwargs.lr", "optim.lr", number),
        key("adamw_kwargs.betas", "optim.betas", numbers),
        key("adamw_kwargs.eps", "optim.eps", number),
        key("adamw_kwargs.weight_decay", "optim.weight_decay", number),
        same("adamw_kwargs.fused", "a matter of kernels"),
        key("lr_scheduler_kwargs.num_warmup_steps", "schedule.warmup_steps", integer),
        computed(
            "lr_scheduler_kwargs.num_training_steps",
            "schedule.name schedule.decay_steps schedule.min_lr_ratio",
            _native_schedule,
            "linear to a tenth of the peak at 90 % of it",
        ),
        key("checkpoint.ckpt_dir", "run_dir", text),
        key("checkpoint.resume_from_checkpoint", "checkpoint.resume", resumed, "true is `auto`"),
        key("checkpoint.save_every_n_steps", "checkpoint.save_every", integer),
        key("checkpoint.max_checkpoints", "checkpoint.keep_last", integer),
        key("checkpoint.async_save", "checkpoint.async_save", truth),
        same(
            "checkpoint.save_final_model checkpoint.use_distributed_checkpoint_fsdp2",
            "a run always writes its last checkpoint",
        ),
        key("logger.frequency", "train.log_every", integer),
        computed("wandb_init_args.project", "logging.wandb_project logging.wandb", wandb, ""),
        key("wandb_init_args.name", "logging.wandb_run_name", text),
        elsewhere("wandb_init_args.*", WANDB),
    ),
    habits=(
        Habit("data.crop", "start", "long proteins were cut at the end"),
        Habit("data.random_residues", "all", "random tokens were of the whole vocabulary"),
    ),
    hydra=True,
    prepare=_native_prepare,
    finish=_native_finish,
)

TABLES = (RECIPE, NATIVE)
