"""The flow by classes as a program: trains, goes on with adapters at another layout, predicts at a third."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from esm2mega.finetune.classes import (
    FineTuneDataModule,
    InMemorySingleValueDataset,
    infer_model,
    train_model,
)
from tests.distributed.runs import SETTINGS
from tests.own_classes import EncoderLoRA, SmallConfig

_RNG = np.random.default_rng(2)
_PAIRS = [
    ("".join(_RNG.choice(list("LAGVSERTIDPKQNFYMHWC"), n)), float(n) / 100) for n in _RNG.integers(20, 90, 14)
]
_SHORT = [text for text in SETTINGS if not text.startswith(("train.max_steps", "model."))]
_MODEL = [text for text in SETTINGS if text.startswith("model.")]
_SPLIT = {
    "tp": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    # The checkpoint says TP 2.
    "pp": [
        "parallel.tensor_model_parallel_size=1",
        "parallel.sequence_parallel=false",
        "parallel.pipeline_model_parallel_size=2",
    ],
}


def main(folder: Path, split: bool) -> None:
    """Write what was measured and predicted to ``folder/found.json``.

    Args:
        folder: Directory of the runs.
        split: Whether two processes run this: data-parallel, then tensor-parallel, then as a pipeline.
    """
    of = _SPLIT if split else {"tp": [], "pp": []}
    dataset = InMemorySingleValueDataset(_PAIRS[:10])
    held_out = InMemorySingleValueDataset(_PAIRS[10:])
    module = FineTuneDataModule(dataset, held_out, held_out)
    config = SmallConfig(overrides=[*_SHORT, *_MODEL, "model.precision=fp64"])
    checkpoint, first, _ = train_model("plain", folder, config, module, 2)
    config = SmallConfig(
        initial_ckpt_path=str(checkpoint),
        initial_ckpt_skip_keys_with_these_prefixes=[],
        overrides=[*_SHORT, *of["tp"]],
    )
    adapted, second, _ = train_model("lora", folder, config, module, 2, transform=EncoderLoRA(rank=3))
    config.initial_ckpt_path, config.overrides = str(adapted), of["pp"]
    predicted = infer_model(config, module)
    if predicted:
        numbers = {"loss", "valid_loss", "grad_norm"}
        losses = [{name: found[name] for name in sorted(numbers)} for found in (first, second)]
        (folder / "found.json").write_text(json.dumps({"losses": losses, "predicted": predicted}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), split=True)
