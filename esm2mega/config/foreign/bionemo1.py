"""Lists the configuration keys of BioNeMo 1 (esm2nv): Hydra files with NeMo's sections.

Pretraining, the FLIP tasks (`downstream_flip.py`) and inference share one set of keys.
"""

from __future__ import annotations

from esm2mega.config.foreign.bionemo1_turns import (
    OPTIM,
    adapted_layers,
    classes,
    finish,
    frozen,
    if_adapters,
    interval,
    mask_column,
    masking,
    optim,
    prepare,
    schedule,
    store,
    tables,
    task,
    unchanged,
)
from esm2mega.config.foreign.rules import Habit, Table, computed, elsewhere, key, same, switch
from esm2mega.config.foreign.values import (
    PRECISIONS,
    clip,
    integer,
    items,
    metric,
    number,
    numbers,
    one_of,
    resumed,
    text,
    texts,
    truth,
    whole_split,
)

_NEEDS_NOTHING = "esm2mega does so, or needs no key for it"

TABLE = Table(
    "BioNeMo 1",
    "Hydra files of esm2nv, and `key=value` behind its programs",
    rules=(
        key("trainer.max_steps", "train.max_steps", integer),
        key("trainer.max_epochs", "train.max_epochs", integer, "instead of `train.max_steps`"),
        computed(
            "trainer.val_check_interval",
            "train.eval_every checkpoint.save_every",
            interval,
            "checkpoints are written at evaluations there",
        ),
        key(
            "trainer.limit_val_batches", "train.eval_batches", whole_split, "1.0, the whole split, is 0 here"
        ),
        same("trainer.limit_test_batches", "`data.test` is evaluated whole, once, at the end"),
        key("trainer.log_every_n_steps", "train.log_every", integer),
        key("trainer.gradient_clip_val", "optim.clip_grad", clip),
        key(
            "trainer.accumulate_grad_batches model.accumulate_grad_batches",
            "train.accumulate_grad_batches",
            integer,
        ),
        key("trainer.precision", "model.precision", one_of(PRECISIONS)),
        elsewhere("trainer.devices", "`torchrun --nproc-per-node` starts the processes of a machine"),
        elsewhere("trainer.num_nodes", "`torchrun` or Slurm starts several machines, see docs/multi-node.md"),
        same(
            "trainer.accelerator trainer.logger trainer.enable_checkpointing trainer.use_distributed_sampler "
            "trainer.replace_sampler_ddp trainer.benchmark",
            _NEEDS_NOTHING,
        ),
        key("model.micro_batch_size", "train.micro_batch_size", integer),
        key("model.global_batch_size", "train.global_batch_size", integer, "null there: from the other two"),
        key("model.seq_length model.data.max_seq_length", "data.max_seq_length", integer),
        key(
            "model.num_layers",
            "model.num_layers",
            integer,
            "the four dimensions of a preset are `model.size`",
        ),
        key("model.hidden_size", "model.hidden_size", integer),
        key("model.ffn_hidden_size", "model.ffn_hidden_size", integer),
        key("model.num_attention_heads", "model.num_attention_heads", integer),
        key("model.hidden_dropout", "model.hidden_dropout", number),
        key("model.attention_dropout", "model.attention_dropout", number),
        key("model.layernorm_epsilon", "model.layernorm_epsilon", number),
        key("model.init_method_std", "model.init_std", number),
        key("model.tensor_model_parallel_size", "parallel.tensor_model_parallel_size", integer),
        key("model.pipeline_model_parallel_size", "parallel.pipeline_model_parallel_size", integer),
        key("model.seed", "seed", integer),
        key(
            "model.activations_checkpoint_method",
            "model.recompute",
            lambda value: "full",
            "uniform or block is `full`",
        ),
        same("model.activations_checkpoint_num_layers", "every layer is recomputed"),
        same("model.position_embedding_type", "ESM-2 has rotary positions", "rope"),
        same("model.embedding_token_dropout model.use_esm_attention model.esm_gelu", "as in ESM-2", "true"),
        same(
            "model.embedding_use_attention_mask model.mask_token_id model.normalize_attention_scores "
            "model.apply_query_key_layer_scaling model.use_pt_layernorm model.use_pt_mlp_out "
            "model.kv_channels "
            "model.max_position_embeddings model.encoder_seq_length model.make_vocab_size_divisible_by "
            "model.pre_process model.post_process model.megatron_legacy model.megatron_amp_O2 "
            "model.drop_last "
            "model.masked_softmax_fusion model.native_amp_init_scale model.native_amp_growth_interval "
            "model.fp32_residual_connection model.fp16_lm_cross_entropy model.use_cpu_initialization "
            "model.onnx_safe",
            "as in ESM-2, or a matter of NeMo's kernels",
        ),
        computed(
            "model.bias_gelu_fusion",
            "model.activation",
            switch({"model.activation": "gelu_tanh"}),
            "the fused kernel computes GELU by tanh",
        ),
        same("model.bert_binary_head", "a head for pairs of sentences does not exist", "false"),
        same("model.tokenizer.*", "the alphabet is that of ESM-2, and needs no files"),
        key("model.resume_from_checkpoint", "init_from", text, "weights alone; the optimizer starts anew"),
        *(
            rule
            for section in OPTIM
            for rule in (
                optim(section, "lr", "optim.lr", number),
                optim(section, "betas", "optim.betas", numbers),
                optim(section, "eps", "optim.eps", number),
                optim(section, "weight_decay", "optim.weight_decay", number),
                *schedule(section),
            )
        ),
        computed(
            "model.data.train.uf50_datapath",
            "data.train",
            store("train"),
            "the store that `esm2mega prepare uniref` makes of the three files; `translate` prints the "
            "command",
        ),
        same(
            "model.data.train.uf90_datapath model.data.train.cluster_mapping_tsv model.data.val_size "
            "model.data.test_size",
            "go into the command that `translate` prints",
        ),
        computed("model.data.val.uf50_datapath", "data.valid", store("valid"), "as for training"),
        computed("model.data.test.uf50_datapath", "data.test", store("test"), "as for training"),
        key("model.data.train.custom_pretraining_fasta_path", "data.train", text),
        key("model.data.val.custom_pretraining_fasta_path", "data.valid", text),
        key("model.data.test.custom_pretraining_fasta_path", "data.test", text),
        computed(
            "model.data.modify_percent model.modify_percent",
            "data.mlm_probability",
            masking("data.mlm_probability"),
            "",
        ),
        computed("model.data.mask_percent", "data.mask_fraction", masking("data.mask_fraction"), ""),
        computed("model.data.perturb_percent", "data.random_fraction", masking("data.random_fraction"), ""),
        computed("model.data.identity_percent", "", unchanged, "is what the other two leave of 1"),
        computed(
            "model.data.dataset_path",
            "data.train data.valid data.test",
            tables,
            "for FLIP the tables `train/x000.csv`, `val/x000.csv` and `test/x000.csv` in it",
        ),
        same("model.data.dataset.train model.data.dataset.val model.data.dataset.test", "name those tables"),
        elsewhere(
            "model.data.preprocessed_data_path", "`esm2mega prepare flip` makes the tables of a FLIP task"
        ),
        same("model.data.task_name", "the tables are named by `data.train` and the others"),
        computed(
            "model.data.task_type", "task.kind task.head", task, "heads are `cnn` for residues, else `mlp`"
        ),
        key("model.data.sequence_column", "data.sequence_column", text),
        key("model.data.target_column", "task.target_columns", texts),
        computed(
            "model.data.target_sizes", "task.num_classes", classes, "of classes, where there is one column"
        ),
        computed("model.data.num_classes", "task.num_classes", classes, ""),
        key("model.data.mask_column", "task.mask_column", mask_column),
        key("model.hidden_layer_size model.cnn_dim", "task.hidden_size", integer),
        key("model.dropout_rate", "task.dropout", number),
        computed(
            "model.loss_func",
            "task.loss",
            lambda value, _: one_of({"mseloss": {"task.loss": "mse"}, "crossentropyloss": {}})(value),
            "MSELoss is `mse`; classes always have cross-entropy",
        ),
        key("model.restore_encoder_path restore_from_path", "init_from", text),
        computed("model.encoder_frozen", "finetune.mode", frozen, "true is `frozen`, false `full`"),
        computed("model.peft.enabled", "finetune.mode", switch({"finetune.mode": "lora"}), "true is `lora`"),
        computed("model.peft.lora_tuning.adapter_dim", "lora.rank", if_adapters("lora.rank", integer), ""),
        computed(
            "model.peft.lora_tuning.adapter_dropout", "lora.dropout", if_adapters("lora.dropout", number), ""
        ),
        key(
            "model.peft.lora_tuning.layer_selection",
            "lora.target_modules",
            adapted_layers,
            "layers are counted from 1 there, from 0 here",
        ),
        same("model.peft.peft_scheme", "LoRA is the only scheme", "lora"),
        same(
            "model.peft.lora_tuning.column_init_method",
            "the first matrix is drawn at random",
            "xavier normal",
        ),
        same("model.peft.lora_tuning.row_init_method", "the second matrix starts at zero", "zero"),
        same("model.peft.lora_tuning.weight_tying", "every layer has adapters of its own", "false"),
        same("model.peft.lora_tuning.position_embedding_strategy", "belongs to tied adapters"),
        key("model.peft.restore_from_path", "init_from", text, "a checkpoint with adapters"),
        same(
            "model.data.emb_batch_size model.data.shuffle model.data.num_workers "
            "model.data.train.num_workers "
            "model.data.val.num_workers model.data.test.num_workers model.data.pin_memory",
            "batches are packed and built ahead; a set is shuffled by the seed",
        ),
        same(
            "model.data.train.* model.data.val.* model.data.test.* model.data.preprocessing.* "
            "model.data.data_impl_kwargs.* model.data.uf90.* model.data.index_mapping_dir "
            "model.data.index_mapping_type model.data.force_regen_sample_mapping model.data.dynamic_padding "
            "model.data.data_prefix model.data.dataloader_type model.data.reset_position_ids "
            "model.data.reset_attention_mask model.data.eod_mask_loss model.data.skip_lines "
            "model.data.drop_last "
            "model.data.ngc_registry_target model.data.ngc_registry_version",
            "there are no index files: sample k is computed from the seed and k",
        ),
        key("exp_manager.exp_dir exp_manager.explicit_log_dir", "run_dir", text),
        key("exp_manager.resume_if_exists", "checkpoint.resume", resumed, "true is `auto`, false `never`"),
        same(
            "exp_manager.name exp_manager.resume_ignore_no_checkpoint exp_manager.create_checkpoint_callback",
            _NEEDS_NOTHING,
        ),
        key("exp_manager.create_wandb_logger", "logging.wandb", truth),
        key("exp_manager.create_tensorboard_logger", "logging.tensorboard", truth),
        key("exp_manager.wandb_logger_kwargs.project", "logging.wandb_project", text),
        key("exp_manager.wandb_logger_kwargs.name", "logging.wandb_run_name", text),
        elsewhere(
            "exp_manager.wandb_logger_kwargs.*",
            "variables of Weights & Biases: WANDB_MODE=offline, WANDB_RUN_GROUP, WANDB_JOB_TYPE, "
            "WANDB_NOTES, WANDB_TAGS",
        ),
        key("exp_manager.checkpoint_callback_params.monitor", "checkpoint.best_metric", metric),
        key("exp_manager.checkpoint_callback_params.save_top_k", "checkpoint.keep_best", integer),
        same(
            "exp_manager.checkpoint_callback_params.mode exp_manager.checkpoint_callback_params.filename "
            "exp_manager.checkpoint_callback_params.model_parallel_size",
            "known from the metric; checkpoints are named step_N and fit every layout",
        ),
        elsewhere(
            "exp_manager.checkpoint_callback_params.always_save_nemo",
            "`esm2mega convert` writes a checkpoint in the formats of others",
        ),
        elsewhere(
            "do_preprocessing", "`data.*` may name files of sequences, or the stores of `esm2mega prepare`"
        ),
        elsewhere("do_training", "`esm2mega pretrain` and `esm2mega finetune` train"),
        elsewhere(
            "do_testing", "`data.test` is evaluated at the end of a run, by `esm2mega evaluate` any time"
        ),
        same("name desc target infer_target", "classes and titles of that system"),
        same("hydra.*", "belongs to Hydra"),
        same("model.dwnstr_task_validation.enabled", "tasks are measured by `esm2mega finetune`", "false"),
        same("model.dwnstr_task_validation.*", "belongs to `model.dwnstr_task_validation.enabled`"),
        elsewhere(
            "model.downstream_task.restore_from_path", "is the argument CHECKPOINT of `esm2mega embed`"
        ),
        key(
            "model.downstream_task.outputs",
            "infer.outputs",
            lambda value: [one_of({"embeddings": "pooled", "hiddens": "residue"})(x) for x in items(value)],
            "embeddings are `pooled`, hiddens `residue`",
        ),
        elsewhere("model.data.output_fname", "is the option `--out` of `esm2mega embed`"),
        elsewhere("model.data.output_format", "the name of `--out` decides; `infer.layout` takes `bionemo`"),
        same("model.data.batch_size", "`infer.micro_batch_tokens` bounds a pack, and changes no result"),
    ),
    habits=(
        Habit("data.crop", "start", "long proteins were cut at the end"),
        Habit("data.too_long", "drop", "labelled proteins above the length were left out", "finetuning"),
        Habit("task.scale_targets", False, "the numbers of a regression were not scaled", "finetuning"),
    ),
    programs=("pretrain.py", "downstream_flip.py"),
    hydra=True,
    processes=("trainer.devices", "trainer.num_nodes"),
    defaults={
        "": {
            "trainer.precision": "32",
            "trainer.max_steps": "500000",
            "trainer.val_check_interval": "1500",
            "trainer.log_every_n_steps": "10",
            "trainer.gradient_clip_val": "1.0",
            "trainer.accumulate_grad_batches": "1",
            "model.micro_batch_size": "2",
            "model.seq_length": "1024",
            "model.num_layers": "6",
            "model.hidden_size": "320",
            "model.num_attention_heads": "20",
            "model.optim.lr": "4e-4",
            "model.optim.weight_decay": "0.01",
            "model.optim.sched.name": "WarmupAnnealDecayHold",
            "model.optim.sched.warmup_steps": "2000",
            "model.optim.sched.anneal_percentage": "0.10",
            "model.seed": "1234",
            "exp_manager.checkpoint_callback_params.save_top_k": "10",
        }
    },
    prepare=prepare,
    finish=finish,
)

TABLES = (TABLE,)
