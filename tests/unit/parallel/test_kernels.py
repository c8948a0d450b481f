"""The gradient-norm and scaling kernels against plain torch."""

from __future__ import annotations

import math

import megatron.core.optimizer
import pytest
import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

from esm2mega.parallel import kernels
from esm2mega.parallel.initialize import process_groups
from esm2mega.train.step import train_step
from tests.unit.runs import packed_batch, tiny_run, train_state

UNUSED = torch.zeros(1, dtype=torch.int)


def _tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = [(5,), (3, 4), (1,), (7, 2, 2)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-15)], ids=str)
def test_norm_is_that_of_one_long_vector(dtype: torch.dtype, bound: float) -> None:
    tensors = _tensors(dtype)
    total, each = kernels.foreach_l2_norm(2048, UNUSED, [tensors], per_tensor=True)
    expected = torch.cat([t.flatten() for t in tensors]).double().square().sum().sqrt()
    assert total.shape == (1,)
    assert total.dtype == dtype
    assert abs(total.item() / expected.item() - 1) <= bound
    assert each is not None
    assert each.tolist() == pytest.approx(
        [t.double().square().sum().sqrt().item() for t in tensors], rel=bound
    )


def test_norm_of_each_only_on_request() -> None:
    assert kernels.foreach_l2_norm(2048, UNUSED, [_tensors(torch.float32)], per_tensor=False)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_into_another_list(dtype: torch.dtype) -> None:
    source, target = _tensors(dtype), [torch.full_like(t, 9) for t in _tensors(dtype)]
    kernels.foreach_scale(2048, UNUSED, [source, target], 0.25)
    assert all(torch.equal(t, s * 0.25) for s, t in zip(source, target, strict=True))
    assert all(torch.equal(s, o) for s, o in zip(source, _tensors(dtype), strict=True)), (
        "the source is only read"
    )


def test_scale_in_place() -> None:
    tensors = _tensors(torch.float64)
    kernels.foreach_scale(2048, UNUSED, [tensors, tensors], 0.25)
    assert all(torch.equal(t, o * 0.25) for t, o in zip(tensors, _tensors(torch.float64), strict=True))


def test_install_replaces_the_fallback_and_spares_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def local_l2_norm() -> None: ...

    def fused_l2_norm() -> None: ...

    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", None)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", fused_l2_norm)
    kernels.install(torch.device("cuda"))
    assert clip_grads.l2_norm_impl is fused_l2_norm
    assert clip_grads.multi_tensor_scale_impl is None
    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_l2_norm)
    kernels.install(torch.device("cuda"))
    assert clip_grads.l2_norm_impl is kernels.foreach_l2_norm
    assert clip_grads.multi_tensor_scale_impl is kernels.foreach_scale


class OnlyOnCuda:
    """A kernel or an optimizer of apex, which Megatron-Core has found and a CPU cannot run."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA only")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_adam_is_that_of_pytorch_wherever_others_are_installed(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """So a state passes between machines with and without Transformer Engine or apex."""
    monkeypatch.setattr(megatron.core.optimizer, "USING_PYTORCH_OPTIMIZER", False)
    for name in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"):
        monkeypatch.setattr(distrib_optimizer, name, True)
    kernels.install(torch.device(device))
    assert megatron.core.optimizer.USING_PYTORCH_OPTIMIZER
    assert not distrib_optimizer.HAVE_APEX_OR_TE
    assert not (distrib_optimizer.USING_TE_OPTIMIZER or distrib_optimizer.USING_APEX_OPTIMIZER)


@pytest.mark.parametrize("distributed", ["false", "true"])
def test_a_cpu_trains_although_megatron_found_fused_kernels(
    monkeypatch: pytest.MonkeyPatch, distributed: str
) -> None:
    monkeypatch.setattr(megatron.core.optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(megatron.core.optimizer, "Adam", OnlyOnCuda)
    for name, value in {"Adam": OnlyOnCuda, "HAVE_APEX_OR_TE": True, "USING_APEX_OPTIMIZER": True}.items():
        monkeypatch.setattr(distrib_optimizer, name, value)
    for module in (clip_grads, optimizer):
        for name in ("multi_tensor_applier", "multi_tensor_scale_impl"):
            monkeypatch.setattr(module, name, OnlyOnCuda)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", OnlyOnCuda)
    run = tiny_run(f"parallel.distributed_optimizer={distributed}", "model.precision=bf16")
    with process_groups(run.parallel, seed=1):
        result = train_step(train_state(run), [packed_batch([[0, 5, 32, 7, 2]], {1: 5, 2: 9})])
    assert math.isfinite(result.grad_norm)


@pytest.mark.parametrize("distributed", ["false", "true"])
def test_a_model_gets_its_main_weights_rounded(distributed: str) -> None:
    run = tiny_run(f"parallel.distributed_optimizer={distributed}", "model.precision=bf16")
    with process_groups(run.parallel, seed=1):
        state = train_state(run)
        weights = list(state.model[0].parameters())
        before = [weight.detach().clone() for weight in weights]
        for _ in range(2):  # the rate of the first step is 0
            train_step(state, [packed_batch([[0, 5, 32, 7, 2]], {1: 5, 2: 9})])
    for weight in weights:
        main = weight.main_param.view_as(weight)  # type: ignore[attr-defined]
        assert main.dtype == torch.float32
        assert torch.equal(weight, main.bfloat16())
    assert any(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clipping_goes_through_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Megatron-Core calls them: the norm of all gradients, then one factor."""
    from megatron.core import parallel_state

    from esm2mega.config.schema import ParallelConfig

    with process_groups(ParallelConfig(), seed=1):
        parameters = [torch.nn.Parameter(torch.zeros_like(t)) for t in _tensors(dtype)]
        for parameter, gradient in zip(parameters, _tensors(dtype), strict=True):
            parameter.grad = gradient
        norm = clip_grads.get_grad_norm_fp32(
            [p.grad for p in parameters if p.grad is not None],
            grad_stats_parallel_group=parallel_state.get_model_parallel_group(),
        )
        clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=0.5, total_norm=norm)
    expected = torch.cat([t.flatten() for t in _tensors(torch.float64)]).norm().item()
    assert norm == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-14)
    for parameter, gradient in zip(parameters, _tensors(dtype), strict=True):
        assert parameter.grad is not None
        # Megatron-Core adds 1e-6 to the norm before it divides.
        assert torch.allclose(parameter.grad, gradient * (0.5 / (expected + 1e-6)), rtol=1e-6)
