"""From configuration to model: the settings that change numbers, and recomputation, which must not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from esm2mega.config.schema import ModelConfig, ParallelConfig
from esm2mega.errors import UserError
from esm2mega.model import attention
from esm2mega.model.build import build_model, transformer_config
from esm2mega.model.esm2 import ESM2Model
from esm2mega.model.packed import PackedSequences

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = ModelConfig(
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=56,
    num_attention_heads=3,
    precision="fp64",
    layer_spec="local",
)
IDS = torch.tensor([0, 5, 32, 2, 0, 6, 2])
PACKED = PackedSequences.from_lengths([4, 3])


def test_settings_that_change_numbers() -> None:
    config = transformer_config(replace(SHAPE, layernorm_epsilon=2e-5), ParallelConfig(), CPU, "sdpa")
    assert config.bias_activation_fusion is False, "the fused kernel is the tanh approximation"
    one = torch.tensor(1.0, dtype=torch.float64)
    # x * (1 + erf(x / sqrt 2)) / 2 at 1; the tanh approximation gives 0.841192
    assert config.activation_func(one).item() == pytest.approx(0.8413447460685429, abs=1e-15)
    tanh = transformer_config(replace(SHAPE, activation="gelu_tanh"), ParallelConfig(), CPU, "sdpa")
    assert tanh.activation_func(one).item() == pytest.approx(0.8411919906082768, abs=1e-15)
    assert config.gated_linear_unit is False
    assert config.hidden_dropout == config.attention_dropout == 0.0
    assert config.layernorm_epsilon == 2e-5
    assert config.add_bias_linear is True
    assert config.apply_residual_connection_post_layernorm is False
    assert config.calculate_per_token_loss is True
    assert config.packed_attention == "sdpa"
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (3, 24, 56)
    assert (config.num_attention_heads, config.kv_channels) == (3, 8)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        *(("fp32", torch.float32), ("bf16", torch.bfloat16)),
        *(("fp16", torch.float16), ("fp64", torch.float64)),
    ],
)
def test_precision(precision: str, dtype: torch.dtype) -> None:
    config = transformer_config(replace(SHAPE, precision=precision), ParallelConfig(), CPU, "sdpa")
    assert (config.params_dtype, config.pipeline_dtype, config.bf16, config.fp16) == (
        dtype,
        dtype,
        precision == "bf16",
        precision == "fp16",
    )


@pytest.mark.parametrize(("device", "on_cpu"), [(CPU, True), (CUDA, False)], ids=str)
def test_weights_are_made_where_they_live(device: torch.device, on_cpu: bool) -> None:
    assert transformer_config(SHAPE, ParallelConfig(), device, "sdpa").use_cpu_initialization is on_cpu


def test_layout() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=3, pipeline_model_parallel_size=1, sequence_parallel=True
    )
    config = transformer_config(SHAPE, parallel, CPU, "sdpa")
    assert (config.tensor_model_parallel_size, config.pipeline_model_parallel_size) == (3, 1)
    assert config.sequence_parallel is True
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (False, True)


def test_pipeline_stages_of_unequal_length() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    config = transformer_config(SHAPE, parallel, CPU, "sdpa")
    layout = config.pipeline_model_parallel_layout
    assert [layout.get_num_layers_to_build(vp_stage=0, pp_rank=rank) for rank in range(2)] == [1, 2]
    assert transformer_config(SHAPE, ParallelConfig(), CPU, "sdpa").pipeline_model_parallel_layout is None


def test_interleaved_schedule_keeps_messages_apart() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    config = transformer_config(replace(SHAPE, num_layers=4), parallel, CPU, "sdpa")
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (True, False)
    assert config.virtual_pipeline_model_parallel_size == 2
    assert config.pipeline_model_parallel_layout is None


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one entry per call of the attention kernel."""
    calls: list[int] = []

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return attention.sdpa(*arguments)  # type: ignore[arg-type]

    for name in ("sdpa", "native"):
        monkeypatch.setitem(attention.KERNELS, name, counted)
    yield calls


def _gradients(recompute: str) -> dict[str, torch.Tensor]:
    (model,) = build_model(replace(SHAPE, recompute=recompute), ParallelConfig(), CPU, seed=5)
    model(IDS, PACKED).logsumexp(-1).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_gives_the_same_gradients(world: None, kernel_calls: list[int], recompute: str) -> None:
    expected = _gradients("none")
    assert len(kernel_calls) == 3
    kernel_calls.clear()
    actual = _gradients(recompute)
    assert len(kernel_calls) == 6, "each layer's attention runs once more in the backward pass"
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.any(), name
        assert (actual[name] - value).abs().max() <= 1e-13 * value.abs().max(), name


def test_selective_recomputation_rests_in_evaluation(world: None, kernel_calls: list[int]) -> None:
    (model,) = build_model(replace(SHAPE, recompute="selective"), ParallelConfig(), CPU, seed=5)
    with torch.no_grad():
        model.eval()(IDS, PACKED)
    assert len(kernel_calls) == 3


def test_model_is_of_the_asked_shape_and_type(world: None) -> None:
    (model,) = build_model(SHAPE, ParallelConfig(), CPU, seed=5)
    assert isinstance(model, ESM2Model)
    assert len(model.encoder.layers) == 3
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    # L (4 H^2 + 4H + 2 H F + F + H + 4H) + 40 H + 2 H + (H^2 + H + 2 H) + 40
    h, f = 24, 56
    layer = 4 * h * h + 4 * h + 2 * h * f + f + h + 4 * h
    assert sum(p.numel() for p in model.parameters()) == 3 * layer + 40 * h + 2 * h + h * h + 3 * h + 40


def test_kernel_that_cannot_run_here_is_an_error(world: None) -> None:
    with pytest.raises(UserError, match="attention_backend=flash"):
        build_model(replace(SHAPE, attention_backend="flash"), ParallelConfig(), CPU, seed=5)
