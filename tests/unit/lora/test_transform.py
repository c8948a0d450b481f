"""The walk of a transform over the modules of a model."""

from __future__ import annotations

import pytest
import torch

from esm2mega.config.schema import ParallelConfig
from esm2mega.lora.inject import is_adapter
from esm2mega.lora.transform import LoRATransform, walk
from esm2mega.model.build import build_model
from tests.unit.runs import tiny_run


@pytest.mark.usefixtures("world")
def test_parents_come_first_and_layers_have_their_number_in_the_model() -> None:
    (model,) = build_model(tiny_run().model, ParallelConfig(), torch.device("cpu"), 1, has_lora=True)
    # As the second stage of a pipeline has them.
    for layer in model.encoder.layers:
        layer.layer_number += 2
    model.config.num_layers = 4
    seen: list[tuple[str, str]] = []
    walk(model, lambda module, name, prefix: seen.append((name, prefix)))
    assert seen[0] == ("", "")
    assert [name for name, prefix in seen if prefix == "encoder.layers"] == ["2", "3"]
    assert ("linear_qkv", "encoder.layers.3.self_attention") in seen
    LoRATransform(2, target_modules=["*.3.*.linear_q"])(model)
    adapters = [name for name, _ in model.named_parameters() if is_adapter(name)]
    # The second of its own layers is the fourth of the model.
    assert {name.rpartition(".")[0] for name in adapters} == {"encoder.layers.1.self_attention.linear_q_lora"}
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert set(adapters) < set(trained)
    assert all(name.startswith(("lm_head.", "output_layer.")) or is_adapter(name) for name in trained)
