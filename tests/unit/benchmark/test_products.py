"""Products are counted as PyTorch counts them, and those of every type are computed."""

from __future__ import annotations

import pytest
import torch

from esm2mega.benchmark.peers import hf_config
from esm2mega.benchmark.products import DTYPES, copy, forward_flops, model_flops, product
from esm2mega.config.presets import PRESETS

CPU = torch.device("cpu")


def test_flops_are_those_that_pytorch_counts() -> None:
    """Hugging Face's model, forward and backward, on two proteins of different length."""
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    model = transformers.EsmForMaskedLM(hf_config("tiny"))
    model.set_attn_implementation("eager")
    forward = 0
    with FlopCounterMode(display=False) as counter:
        for length in (7, 30):
            before = counter.get_total_flops()
            logits = model(input_ids=torch.full((1, length), 5)).logits
            forward += counter.get_total_flops() - before
            logits.sum().backward()
    assert model_flops(PRESETS["tiny"], [7, 30]) == counter.get_total_flops()
    assert forward_flops(PRESETS["tiny"], [7, 30], has_logits=True) == forward
    # The head: 128 x 128, and 128 x 33.
    without = forward_flops(PRESETS["tiny"], [7, 30], has_logits=False)
    assert forward - without == 2 * 37 * 128 * (128 + 33)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_product_is_computed(precision: str) -> None:
    work = product(64, 32, 96, DTYPES[precision], CPU)
    result = work.run()
    assert isinstance(result, torch.Tensor) and result.shape == (64, 96)
    assert work.units == 2 * 64 * 32 * 96


def test_a_copy_reads_and_writes() -> None:
    assert copy(1000, CPU).units == 2000
