"""Defines the configuration of a run as typed dataclasses: one for each section, and `Run`, which holds them.

Every key, its unit and its valid values are described in `conf/base.yaml`, which lists exactly these fields
with these defaults (a test compares the two). A field with a closed set of values carries it, see `choices`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MODEL_SIZES = ("tiny", "8M", "35M", "150M", "650M", "3B", "15B")


def _choice(default: Any, *values: str) -> Any:
    """Make a field whose value must be one of `values` (or null if its type allows it)."""
    return field(default=default, metadata={"choices": values})


def _path(default: Any = None) -> Any:
    """Make a field that names a file or directory, or several of them."""
    return field(default=default, metadata={"is_path": True})


@dataclass
class ModelConfig:
    """Sets shape and numerics of the model; the shape is a `size`, or all four dimensions."""

    size: str | None = _choice(None, *MODEL_SIZES)
    family: str = _choice("esm2", "esm2", "proteinbert_preln", "proteinbert_postln")
    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    precision: str = _choice("fp32", "fp32", "bf16", "fp16", "fp64")
    layer_spec: str = _choice("auto", "auto", "local", "te")
    attention_backend: str = _choice("auto", "auto", "sdpa", "native", "varlen", "flash", "te")
    recompute: str = _choice("none", "none", "selective", "full")
    compile: bool = False
    fp8: str | None = _choice(None, "e4m3", "hybrid")
    fp8_recipe: str = _choice("tensorwise", "tensorwise", "mxfp8")
    activation: str = _choice("gelu", "gelu", "gelu_tanh")
    layernorm_epsilon: float = 1e-5
    final_layernorm: bool = True
    max_positions: int | None = None
    init_std: float = 0.02
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0


@dataclass
class ParallelConfig:
    """Says how the model is split over processes; the data-parallel size follows from the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    context_parallel_exchange: str = _choice("auto", "auto", "heads", "needed", "gather")
    distributed_optimizer: bool = False
    timeout_minutes: float = 30.0


@dataclass
class DataConfig:
    """Names the data and says how they are cropped, masked and packed.

    Lengths count tokens with `<cls>` and `<eos>`.
    """

    train: Any = _path()  # str | list[str] | None, which OmegaConf cannot type; loading checks it
    weights: list[float] | None = None
    valid: str | None = _path()
    test: str | None = _path()
    split: str | None = None
    split_by: str = "random"
    split_seed: int = 0
    limit: int | None = None
    sampling: str = _choice("auto", "auto", "clusters", "sequences")
    cache_dir: str | None = _path()
    sequence_column: str = "sequence"
    id_column: str | None = None
    wild_type: str | None = _path()
    mutation_column: str = "mutant"
    first_residue: int = 1
    numbers: str = _choice("plain", "plain", "decimal_comma", "thousands_comma")
    max_seq_length: int = 1024
    crop: str = _choice("random", "random", "start", "chunk")
    mlm_probability: float = 0.15
    mask_fraction: float = 0.8
    random_fraction: float = 0.1
    random_residues: str = _choice("amino_acids", "amino_acids", "all")
    packing: str = _choice("pack", "pack", "bucket")
    pack_window: int | None = None
    workers: int = 0
    too_long: str = _choice("error", "error", "crop", "drop")
    allow_overlap: bool = False

    def train_paths(self) -> list[str]:
        """Return the paths of `train` as a list, which may be empty."""
        if self.train is None:
            return []
        return [self.train] if isinstance(self.train, str) else list(self.train)


@dataclass
class EarlyStoppingConfig:
    """Says when a run ends because `checkpoint.best_metric` no longer improves."""

    patience: int = 0
    min_delta: float = 0.0


@dataclass
class TrainConfig:
    """Sets the batch sizes in tokens or in proteins, the length of the run and how often it reports."""

    micro_batch_tokens: int = 4096
    global_batch_tokens: int = 4096
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    accumulate_grad_batches: int | None = None
    max_steps: int = 1000
    max_epochs: int | None = None
    eval_every: int = 0
    eval_batches: int = 0
    log_every: int = 10
    max_minutes: float | None = None
    on_nonfinite: str = _choice("stop", "stop", "skip", "rollback")
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)


@dataclass
class EvalConfig:
    """Says which residues a language model is evaluated on, whatever residues it is trained on."""

    mlm_probability: float = 0.15
    mask_fraction: float = 0.8
    random_fraction: float = 0.1
    seed: int = 0


@dataclass
class OptimConfig:
    """Sets up Adam with decoupled weight decay; the defaults are those of ESM-2."""

    lr: float = 4e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    initial_loss_scale: float = 4096.0


@dataclass
class ScheduleConfig:
    """Sets the learning rate over optimizer steps; loading fills `decay_steps` if it is null."""

    name: str = _choice("linear", "linear", "cosine", "cosine_plateau", "constant")
    warmup_steps: int = 2000
    decay_steps: int | None = None
    min_lr_ratio: float = 0.1


@dataclass
class CheckpointConfig:
    """Says when checkpoints are saved, which are kept, and which one a start resumes."""

    save_every: int = 0
    keep_last: int = 2
    keep_best: int = 1
    best_metric: str = "valid_loss"
    resume: str = _path("auto")  # or never
    async_save: bool = False
    verify: bool = True


@dataclass
class LoggingConfig:
    """Chooses what is logged besides the records of `log.jsonl`, which always are."""

    samples: bool = False
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str | None = None
    wandb_run_name: str | None = None


TASK_KINDS = (
    "regression",
    "classification",
    "multilabel",
    "token_classification",
    "token_regression",
    "contact",
)


@dataclass
class TaskConfig:
    """Says what is predicted from proteins, by which head, and with which loss it is trained."""

    kind: str | None = _choice(None, *TASK_KINDS)
    target_columns: list[str] = field(default_factory=lambda: ["target"])
    mask_column: Any = None  # str | list[str | None] | None; loading and `validate_task` check it
    label_file: str | None = _path()
    mask_file: str | None = _path()
    classes: list[Any] | None = None  # of texts, or of lists of texts and nulls; checked as mask_column is
    num_classes: int | None = None
    head: str = _choice(
        *("auto", "auto", "mlp", "linear", "pooler", "hf", "cnn", "product", "attention_maps"),
        *("tape", "proteinlm"),
    )
    pooling: str = _choice("mean", "mean", "cls", "max", "attention")
    hidden_size: int | None = None
    dropout: float = 0.25
    pooler_activation: str = _choice("tanh", "tanh", "gelu")
    loss: str = _choice("mse", "mse", "huber")
    huber_delta: float = 1.0
    scale_targets: bool = True
    class_weights: str = _choice("none", "none", "balanced")
    label_smoothing: float = 0.0
    bootstrap: int = 1000


@dataclass
class DownstreamConfig:
    """Names the benchmark tables that a pretraining is measured on, how often, and within which bounds."""

    tasks: list[str] = field(default_factory=list, metadata={"is_path": True})
    every: int = 1
    max_train: int = 500
    max_test: int = 200
    max_residues: int = 10000
    memory_gb: float = 4.0


@dataclass
class FinetuneConfig:
    """Says which weights of a model are fine-tuned, how fast, and which are taken from `init_from`."""

    mode: str = _choice("full", "full", "frozen", "lora")
    freeze: list[str] = field(default_factory=list)
    lr_scale: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0
    load_head: bool = False
    skip: list[str] = field(default_factory=list)
    strict: bool = True


@dataclass
class LoRAConfig:
    """Sets up low-rank adapters of linears; there are none unless `rank` is set."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["linear_qkv"])
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = _choice("none", "none", "all", "lora_only")

    @property
    def scaling(self) -> float:
        """Return the factor that scales the product of an adapter's two matrices."""
        assert self.rank is not None
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass
class InferConfig:
    """Says what `embed` computes and stores, and what inference does with long proteins."""

    outputs: list[str] = field(default_factory=lambda: ["residue", "pooled"])
    layers: list[int] = field(default_factory=lambda: [-1])
    pooling: str = _choice("mean", "mean", "cls", "max")
    precision: str | None = _choice(None, "fp32", "bf16", "fp16", "fp64", "int8")
    max_drift: float = 0.02
    dtype: str = _choice("fp32", "fp32", "fp16", "bf16", "fp64")
    layout: str = _choice("ragged", "ragged", "bionemo")
    compression: str = _choice("none", "none", "gzip", "lzf")
    too_long: str = _choice("error", "error", "crop", "chunk")
    max_seq_length: int | None = None
    overlap: int | None = None
    micro_batch_tokens: int | None = None


@dataclass
class Run:
    """Holds the whole configuration of a run: everything that decides its numbers and its files."""

    run_dir: str = _path("runs/esm2")
    seed: int = 1234
    init_from: str | None = _path()
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    downstream: DownstreamConfig = field(default_factory=DownstreamConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    infer: InferConfig = field(default_factory=InferConfig)

    @property
    def drops_in_encoder(self) -> bool:
        """Return whether the encoder or an adapter in the model drops something in training."""
        adapters = self.lora.rank is not None and self.lora.dropout > 0
        return adapters or self.model.hidden_dropout > 0 or self.model.attention_dropout > 0


def flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return all leaf values of a configuration dataclass by their dotted names, in the schema's order."""
    leaves: dict[str, Any] = {}
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            leaves.update(flatten(value, f"{prefix}{entry.name}."))
        else:
            leaves[prefix + entry.name] = value
    return leaves


def map_paths(section: Any, change: Callable[[str, str], str], prefix: str = "") -> Any:
    """Return a copy of a configuration dataclass with `change(key, path)` in place of each path."""
    changed: dict[str, Any] = {}
    for entry in dataclasses.fields(section):
        key, value = f"{prefix}{entry.name}", getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            changed[entry.name] = map_paths(value, change, f"{key}.")
        elif entry.metadata.get("is_path") and value is not None:
            several = isinstance(value, list)
            changed[entry.name] = [change(key, x) for x in value] if several else change(key, value)
    return dataclasses.replace(section, **changed)


def choices(section: Any, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Return the valid values of each field that has a closed set of them, by its dotted name."""
    found: dict[str, tuple[str, ...]] = {}
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            found.update(choices(value, f"{prefix}{entry.name}."))
        elif "choices" in entry.metadata:
            found[prefix + entry.name] = entry.metadata["choices"]
    return found
