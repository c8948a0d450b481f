"""Lists the keys of Cerebras Model Zoo's ESM-2: YAML params files of pretraining and of classification.

Later versions keep the same keys below `trainer`; `ALIASES` maps these to the earlier ones.
"""

from __future__ import annotations

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
    ONLY_ADAM,
    PRECISIONS,
    Untranslated,
    integer,
    items,
    number,
    numbers,
    one_of,
    ratio,
    text,
    truth,
)

ALIASES = (
    ("trainer.init.model_dir", "runconfig.model_dir"),
    ("trainer.init.seed", "runconfig.seed"),
    ("trainer.init.model.", "model."),
    ("trainer.init.optimizer.Adam.", "optimizer."),
    ("trainer.init.optimizer.AdamW.", "optimizer."),
    ("trainer.init.schedulers", "optimizer.learning_rate"),
    ("trainer.init.precision.fp16_type", "model.fp16_type"),
    ("trainer.init.precision.loss_scaling_factor", "optimizer.loss_scaling_factor"),
    ("trainer.init.loop.max_steps", "runconfig.max_steps"),
    ("trainer.init.loop.num_epochs", "runconfig.num_epochs"),
    ("trainer.init.loop.eval_frequency", "runconfig.eval_frequency"),
    ("trainer.init.loop.eval_steps", "runconfig.eval_steps"),
    ("trainer.init.checkpoint.steps", "runconfig.checkpoint_steps"),
    ("trainer.init.logging.log_steps", "runconfig.log_steps"),
    ("trainer.fit.ckpt_path", "runconfig.checkpoint_path"),
    ("trainer.fit.train_dataloader.", "train_input."),
    ("trainer.fit.val_dataloader.", "eval_input."),
)
"""Maps the beginnings of keys in files of the later form to those of the earlier one."""


def _finetunes(source: Source) -> bool:
    return source.get("model.num_labels") is not None


def _precision(value: Any, source: Source) -> Settings:
    if source.get("model.mixed_precision") is not None and not truth(source.get("model.mixed_precision")):
        return {"model.precision": "fp32"}
    return {"model.precision": one_of(PRECISIONS)(value)}


def _mixed(value: Any, source: Source) -> Settings:
    if not truth(value):
        return {"model.precision": "fp32"}
    return {} if source.get("model.fp16_type") else {"model.precision": "bf16"}


def _data(split: str, section: str) -> Any:
    """Return the turn of a folder of data, which are read where they are tables of a classification."""

    def turn(value: Any, source: Source) -> Settings:
        if source.get(f"{section}.data_processor") not in (None, "BertCSVDataProcessor"):
            raise Untranslated(
                "its files hold token ids in HDF5; make a store of the FASTA that they were made from, and "
                "set "
                f"data.{split}"
            )
        if not _finetunes(source):
            raise Untranslated(
                f"its files hold masked proteins; make a store of the FASTA that they were made from, and "
                f"set data.{split}"
            )
        return {f"data.{split}": text(value)}

    return turn


def _pieces(value: Any) -> list[dict[str, Any]]:
    """Return the pieces of a schedule, one after the other, in either form of files."""
    pieces = items(value)
    if len(pieces) == 1 and isinstance(pieces[0], dict) and "SequentialLR" in pieces[0]:
        inner = pieces[0]["SequentialLR"]
        pieces = inner.get("schedulers", []) if isinstance(inner, dict) else []
    found = []
    for piece in pieces:
        if isinstance(piece, dict) and set(piece) == {"LinearLR"}:
            piece = piece["LinearLR"]
        elif not isinstance(piece, dict) or piece.get("scheduler") != "Linear":
            raise Untranslated("schedules are pieces of the kind Linear; set schedule.name and its steps")
        if not isinstance(piece, dict):
            raise Untranslated("a piece of the schedule is not readable")
        found.append(piece)
    return found


def _schedule(value: Any, source: Source) -> Settings:
    """Turn a rise from 0, a fall, and what follows, into a warmup, a decay and a smallest rate."""
    if isinstance(value, str):
        return {"optim.lr": number(value), "schedule.name": "constant", "schedule.warmup_steps": 0}
    pieces = _pieces(value)
    rates = [(number(p.get("initial_learning_rate")), number(p.get("end_learning_rate"))) for p in pieces]
    steps = [integer(p.get("total_iters", p.get("steps"))) for p in pieces]
    if len(pieces) < 2 or rates[0][0] or rates[0][1] != rates[1][0]:
        raise Untranslated("is not a rise from 0 followed by a fall; set schedule.name and its steps")
    return {
        "optim.lr": rates[0][1],
        "schedule.name": "linear",
        "schedule.warmup_steps": steps[0],
        "schedule.decay_steps": steps[0] + steps[1],
        "schedule.min_lr_ratio": ratio(rates[1][1], rates[0][1]),
    }


_PROBLEMS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
}


def _labels(value: Any, source: Source) -> Settings:
    kind = one_of(_PROBLEMS)(source.get("model.problem_type") or "single_label_classification")
    found: Settings = {"task.kind": kind, "task.head": "pooler", "task.pooler_activation": "gelu"}
    if kind == "classification":
        found["task.num_classes"] = integer(value)
    return found


def _strict(value: Any, source: Source) -> Settings:
    return {"finetune.strict": not truth(value)} if _finetunes(source) else {}


def _rotary(value: Any, source: Source) -> Settings:
    hidden, heads = source.number("model.hidden_size"), source.number("model.num_heads")
    if hidden and heads and integer(value) != hidden // heads:
        raise Untranslated("all channels of a head are rotated")
    return {}


def _eval_batches(value: Any, source: Source) -> Settings:
    raise Untranslated("counts batches of proteins; left out, data.valid is evaluated whole")


def finish(settings: Settings, source: Source) -> list[str]:
    """Say what of a schedule of three pieces is left out."""
    value = source.get("optimizer.learning_rate")
    try:
        pieces = len(_pieces(value)) if not isinstance(value, str) and value is not None else 0
    except Untranslated:
        return []
    if pieces < 3:
        return []
    end = settings.get("schedule.decay_steps")
    return [f"optimizer.learning_rate: pieces after the second are left out; after step {end} the rate stays"]


TABLE = Table(
    "Cerebras Model Zoo",
    "YAML params files of ESM-2; `trainer.init.model.X` of later versions is `model.X` here, and so on",
    rules=(
        computed("train_input.data_dir", "data.train", _data("train", "train_input"), "of classification"),
        computed("eval_input.data_dir", "data.valid", _data("valid", "eval_input"), "of classification"),
        key("train_input.batch_size", "train.global_batch_size", integer),
        key("train_input.micro_batch_size", "train.micro_batch_size", integer),
        key("train_input.max_sequence_length model.max_position_embeddings", "data.max_seq_length", integer),
        same(
            "eval_input.batch_size eval_input.micro_batch_size eval_input.max_sequence_length",
            "evaluations take the packs of training",
        ),
        same(
            "train_input.data_processor eval_input.data_processor train_input.shuffle eval_input.shuffle "
            "train_input.shuffle_seed eval_input.shuffle_seed train_input.num_workers eval_input.num_workers "
            "train_input.prefetch_factor eval_input.prefetch_factor train_input.persistent_workers "
            "eval_input.persistent_workers train_input.use_vsl eval_input.use_vsl",
            "the reader is found by the files; a set is shuffled by `seed`, and proteins are packed",
        ),
        key(
            "model.num_hidden_layers",
            "model.num_layers",
            integer,
            "the four dimensions of a preset are `model.size`",
        ),
        key("model.hidden_size", "model.hidden_size", integer),
        key("model.filter_size", "model.ffn_hidden_size", integer),
        key("model.num_heads", "model.num_attention_heads", integer),
        key("model.dropout_rate", "model.hidden_dropout", number),
        key("model.attention_dropout_rate", "model.attention_dropout", number),
        key("model.layer_norm_epsilon", "model.layernorm_epsilon", number),
        key("model.initializer_range", "model.init_std", number),
        computed("model.fp16_type", "model.precision", _precision, "cbfloat16 and bfloat16 are `bf16`"),
        computed("model.mixed_precision", "model.precision", _mixed, "false is `fp32`"),
        same("trainer.init.precision.enabled", "see `model.precision`"),
        key("model.use_final_layer_norm", "model.final_layernorm", truth),
        same("model.encoder_nonlinearity model.mlm_nonlinearity", "GELU, with erf, is that of ESM-2", "gelu"),
        same("model.position_embedding_type", "ESM-2 has rotary positions", "rotary"),
        computed("model.rotary_dim", "", _rotary, "all channels of a head are rotated"),
        same("model.embedding_layer_norm", "ESM-2 has no LayerNorm after the embedding", "false"),
        same("model.token_dropout model.share_embedding_weights model.disable_nsp", "as in ESM-2", "true"),
        same("model.mlm_loss_weight", "the loss is a mean over the residues to predict"),
        same("model.name model.vocab_size model.pad_token_id model.mask_token_id", "as in ESM-2"),
        computed(
            "model.num_labels",
            "task.kind task.num_classes task.head task.pooler_activation",
            _labels,
            "the head is `pooler` with GELU",
        ),
        same("model.problem_type", "goes into `task.kind`; without it the task is a classification"),
        key("model.classifier_dropout", "task.dropout", number),
        key(
            "model.freeze_pretrained_model",
            "finetune.mode",
            lambda value: "frozen" if truth(value) else "full",
            "true is `frozen`",
        ),
        same("model.compute_eval_metrics", "metrics are always computed"),
        same("optimizer.optimizer_type", ONLY_ADAM, "adam adamw"),
        key("optimizer.betas", "optim.betas", numbers),
        key("optimizer.eps", "optim.eps", number),
        key("optimizer.weight_decay", "optim.weight_decay", number),
        computed(
            "optimizer.learning_rate",
            "optim.lr schedule.name schedule.warmup_steps schedule.decay_steps schedule.min_lr_ratio",
            _schedule,
            "a rise from 0 is the warmup, the fall after it the decay; a number is a constant rate",
        ),
        same("optimizer.loss_scaling_factor", "with `model.precision` fp16 losses are scaled dynamically"),
        same("optimizer.log_summaries", "the norm of the gradient is in every record"),
        key("runconfig.max_steps runconfig.num_steps", "train.max_steps", integer),
        key("runconfig.num_epochs", "train.max_epochs", integer),
        key("runconfig.log_steps", "train.log_every", integer),
        key("runconfig.checkpoint_steps", "checkpoint.save_every", integer),
        key("runconfig.eval_frequency", "train.eval_every", integer),
        computed("runconfig.eval_steps", "", _eval_batches, "`data.valid` is evaluated whole"),
        key("runconfig.seed", "seed", integer),
        key("runconfig.model_dir", "run_dir", text),
        key("runconfig.checkpoint_path", "init_from", text),
        computed(
            "runconfig.disable_strict_checkpoint_loading", "finetune.strict", _strict, "true is `false` here"
        ),
        same("runconfig.load_checkpoint_states", "`init_from` takes the weights alone", "model"),
        same("runconfig.save_initial_checkpoint", "the weights of step 0 follow from `seed`"),
        absent("runconfig.num_act_servers", "belongs to a Cerebras system"),
        absent(
            "trainer.init.backend.*", "belongs to a Cerebras system; here the launcher starts the processes"
        ),
        same(
            "trainer.init.callbacks trainer.init.precision.*",
            "callbacks and loss scales of that trainer are not needed",
        ),
        elsewhere(
            "trainer.validate.* trainer.validate_all.*",
            "`esm2mega evaluate` measures a checkpoint on any data",
        ),
    ),
    habits=(
        Habit("data.crop", "start", "long proteins were cut at the end"),
        Habit(
            "data.too_long", "crop", "labelled proteins above the length were cut at the end", "finetuning"
        ),
        Habit("task.target_columns", ["labels"], "was the name of the column", "finetuning"),
        Habit("optim.clip_grad", 0.0, "gradients were not clipped"),
    ),
    aliases=ALIASES,
    finish=finish,
)

TABLES = (TABLE,)
