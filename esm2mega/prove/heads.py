"""Lists the heads that are proven, with the overrides that switch their fine-tunings on."""

from __future__ import annotations

HEADS: dict[str, tuple[str, ...]] = {
    "mlp": ("task.kind=regression", "task.target_columns=[a, b]"),
    "attention": (
        "task.kind=classification",
        "task.target_columns=[class]",
        "task.head=linear",
        "task.pooling=attention",
        "task.class_weights=balanced",
        "task.label_smoothing=0.1",
    ),
    "max": ("task.kind=regression", "task.target_columns=[a]", "task.pooling=max", "task.loss=huber"),
    "pooler": (
        "task.kind=multilabel",
        "task.target_columns=[flags]",
        "task.head=pooler",
        "task.pooler_activation=gelu",
        "data.crop=start",
    ),
    "hf": ("task.kind=classification", "task.target_columns=[class]", "task.head=hf", "data.crop=start"),
    "cnn": (
        "task.kind=token_classification",
        "task.target_columns=[letters]",
        "task.mask_column=mask",
        "task.head=cnn",
    ),
    "targets": (
        "task.kind=token_classification",
        "task.target_columns=[letters, states]",
        "task.mask_column=[mask, seen]",
        "task.head=cnn",
        "task.class_weights=balanced",
    ),
    "product": ("task.kind=contact", "task.target_columns=[atoms]", "task.mask_column=mask"),
    "attention_maps": (
        "task.kind=contact",
        "task.target_columns=[atoms]",
        "task.head=attention_maps",
    ),
    "frozen_maps": (
        "task.kind=contact",
        "task.target_columns=[atoms]",
        "task.head=attention_maps",
        "finetune.mode=frozen",
    ),
    "residue": ("task.kind=token_regression", "task.target_columns=[numbers]"),
    "frozen": (
        "task.kind=token_classification",
        "task.target_columns=[letters]",
        "task.mask_column=mask",
        "finetune.mode=frozen",
    ),
    "freeze": (
        "task.kind=regression",
        "task.target_columns=[a, b]",
        "finetune.freeze=[embedding.*, encoder.layers.*.mlp.*]",
        "finetune.lr_scale={head.*: 3.0, 'encoder.layers.1.*': 0.5}",
        "finetune.layer_decay=0.8",
    ),
    "own": ("task.kind=regression", "task.target_columns=[a, b]"),
    "tape": (
        "task.kind=token_classification",
        "task.target_columns=[letters]",
        "task.mask_column=mask",
        "task.head=tape",
    ),
}
"""Maps each name that ``--head`` takes to the overrides that switch its fine-tuning on."""

CODE = {"own": "esm2mega.prove.own_classes:OwnConfig"}
"""Maps those of them that are a user's own code to its name."""

ADAPTABLE = tuple(
    head for head, settings in HEADS.items() if not any(text.startswith("finetune.") for text in settings)
)
"""Lists the heads that adapters can be trained with."""
