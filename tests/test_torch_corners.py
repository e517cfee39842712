"""Corners that users of torch have met: zeros without memory, checkpoints, masks over NaN, threads that change."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from torch import nn

import groupnorm.torch as gnt
from groupnorm.torch import call


def test_gradients_that_are_zeros_without_memory() -> None:
    x = torch.randn(2, 8, 5, requires_grad=True)
    torch.sgn(gnt.group_norm(x, 4)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    (g,) = torch.autograd.grad(gnt.group_norm(x, 4).abs().sum(), x, create_graph=True)
    g.square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_place_inside_a_checkpoint(reentrant: bool) -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        stem = nn.Conv2d(3, 8, 1)
        block = nn.Sequential(gnt.GroupNorm(4, 8, activation="silu", inplace=inplace), nn.Conv2d(8, 8, 1))
        x = torch.randn(2, 3, 5, 5, requires_grad=True)
        h = stem(x)
        y: Any = torch.utils.checkpoint.checkpoint(block, h, use_reentrant=reentrant)
        (y.square().sum() + h.sum()).backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_in_place_under_transforms() -> None:
    norm, x = gnt.GroupNorm(2, 4, inplace=True), torch.randn(2, 4, 3)
    kept = x.clone()

    def of_weight(weight: Any) -> Any:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    _, tangent = torch.func.jvp(of_weight, (norm.weight.detach(),), (torch.ones(4),))
    torch.testing.assert_close(tangent, nn.functional.group_norm(kept, 2))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "sigmoid", "tanh"])
def test_nan_in_a_residual_behind_the_mask(activation: str) -> None:
    x, residual = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    mask = torch.arange(6)[None] < 4
    residual[..., 4:] = torch.nan

    def total(x: Any) -> Any:
        return gnt.group_norm(x, 2, residual=residual, mask=mask, activation=activation).square().sum()

    by_engine = torch.autograd.grad(total(t := x.clone().requires_grad_()), t)[0]
    torch.testing.assert_close(torch.func.grad(total)(x), by_engine)
    assert torch.isfinite(by_engine).all()


def test_normalize_lies_in_memory_the_same_way_with_a_gradient() -> None:
    x = torch.randn(2, 5, 8).transpose(1, 2)
    m = gnt.moments(x, 4)
    y, followed = gnt.normalize(x, m), gnt.normalize(x.detach().requires_grad_(), m)
    assert y.stride() == followed.stride()


def test_a_call_that_raises_teaches_nothing() -> None:
    norm = gnt.GroupNorm(2, 8, track_running_stats=True)
    with pytest.raises(ValueError, match="weight"):
        norm(torch.randn(2, 4, 3))
    assert norm.num_batches_tracked == 0


def test_backward_follows_the_number_of_threads() -> None:
    x = torch.randn(4, 32, 64, 64, requires_grad=True)
    before = torch.get_num_threads()
    try:
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            kind = call.kind_of(x, 8, None, None, 1e-5, None, None, None, None, None, None)
            gnt.group_norm(x, 8).backward(torch.ones_like(x))
            used = {key[1]: value.run.args[0].threads for key, value in kind.backwards.items()}  # type: ignore[union-attr]
            assert used[threads] == threads
    finally:
        torch.set_num_threads(before)


def test_options_that_cannot_be_hashed() -> None:
    x = torch.randn(2, 8, 5)
    assert torch.equal(gnt.group_norm(x, 4, eps=np.array(1e-5)), gnt.group_norm(x, 4))  # type: ignore[arg-type]


def test_a_residual_is_of_the_type_of_x_on_every_road() -> None:
    x, residual = torch.randn(2, 8, 5).half(), torch.randn(2, 8, 5) * 3
    plain = gnt.group_norm(x, 4, residual=residual)
    mapped = torch.vmap(lambda t: gnt.group_norm(t, 4, residual=residual))(x[None])[0]
    torch.testing.assert_close(plain, mapped, rtol=2e-3, atol=2e-3)
    huge = torch.full_like(residual, -1e5)
    assert torch.equal(gnt.group_norm(x, 4, residual=huge), torch.vmap(lambda t: gnt.group_norm(t, 4, residual=huge))(
        x[None])[0])  # fmt: skip


def test_the_operator_looks_at_shapes() -> None:
    x, w = torch.randn(2, 8, 5), torch.ones(8)
    y, stats = torch.ops.groupnorm.group_norm(x, 4, w, w, 1e-5, None, None, None, None, None)
    options = (x, stats, 4, w, w, 1e-5, None, None, None, None, None)
    torch.ops.groupnorm.group_norm_backward(y, *options)
    with pytest.raises(ValueError, match="x's shape"):
        torch.ops.groupnorm.group_norm_backward(y[:1].clone(), *options)


def test_gradients_that_nobody_needs_are_not_given() -> None:
    x, residual = torch.randn(2, 8, 5), torch.randn(2, 8, 5)
    _, stats = torch.ops.groupnorm.group_norm(x, 4, None, None, 1e-5, "silu", None, None, residual, None)
    for needs in ([True, *[False] * 5], [*[False] * 5, True]):
        found = torch.ops.groupnorm.group_norm_backward(
            x, x, stats, 4, None, None, 1e-5, "silu", None, None, residual, None, needs
        )
        assert [gradient.numel() > 0 for gradient in found] == needs


def test_the_operator_without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that was exported where there is one may run where there is none."""
    x, w, mask = torch.randn(2, 8, 5, 6), torch.randn(8), torch.rand(2, 5, 6) < 0.7
    arguments = (4, w, w, 1e-5, "silu", None, None, None, mask)
    want, stats = torch.ops.groupnorm.group_norm(x, *arguments)
    monkeypatch.setattr(call, "is_plain", lambda *tensors: False)
    monkeypatch.setattr(call, "_kinds", {})
    y, same = torch.ops.groupnorm.group_norm(x, *arguments)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(same, stats)
    with pytest.raises(ValueError, match="no engine computes gradients"):
        torch.ops.groupnorm.group_norm_backward(x, x, stats, *arguments)
