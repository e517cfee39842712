"""What others do to a model before, after and while it is converted."""

from typing import Any

import pytest

pytest.importorskip("torch")
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import groupnorm.torch as gnt


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 4), nn.ReLU()

    def forward(self, x: Any, r: Any = None) -> Any:
        v = self.norm(x)
        v = v + r
        v = self.act(v)
        return v


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.GroupNorm(2, 4), nn.ReLU()

    def forward(self, x: Any) -> Any:
        return self.act(self.norm(x))


class Shadowed(nn.Module):
    """Its `relu` is a variable of its own, which a function inside reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Any) -> Any:
        relu = torch.exp
        h = relu(self.norm(x))

        def twice(t: Any) -> Any:
            return relu(t) + t

        return twice(h)


class Captured(nn.Module):
    """What the norm gave is read once more, later, by a function inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        self.later: Any = None

    def forward(self, x: Any) -> Any:
        h = self.norm(x)
        self.later = lambda: h
        return F.relu(h)


class Apart(nn.Module):
    def __init__(self, keeps: str) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
        self.second = nn.Sequential(nn.SiLU())
        self.keeps = keeps
        self.features: Any = []

    def forward(self, x: Any) -> Any:
        h = self.first(x)
        if self.keeps == "it":
            self.features = h
        elif self.keeps == "in a list":
            self.features.append(h)
        return self.second(h)


relu = F.relu
X = torch.randn(2, 4, 5, 6)


def test_a_wrapped_norm_is_not_reverted() -> None:
    """Hooks of diffusers and accelerate put a forward around that of the object."""
    norm = nn.GroupNorm(2, 4)
    model = nn.Sequential(norm)
    gnt.convert(model)
    inner = norm.forward
    norm.forward = lambda x: inner(x + 0)  # type: ignore[method-assign]
    report = gnt.revert(model)
    assert report.count("skipped") == 1
    assert "replaced" in str(report)
    torch.testing.assert_close(model(X), F.group_norm(X, 2))


def test_a_forward_that_was_put_back_is_no_obstacle() -> None:
    for model in (nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), Plain()):
        for module in model.modules():
            module.forward = module.forward  # type: ignore[method-assign]
        want = model(X)
        report = gnt.convert(model)
        assert (report.count("swapped"), report.count("fused"), report.count("skipped")) == (1, 1, 0)
        torch.testing.assert_close(model(X), want)
        gnt.revert(model)
        assert type(next(m for m in model.modules() if isinstance(m, nn.GroupNorm))) is nn.GroupNorm
        torch.testing.assert_close(model(X), want)


def test_nothing_added_is_no_residual() -> None:
    block = Block()
    gnt.convert(block)
    torch.testing.assert_close(block(X, X), F.relu(F.group_norm(X, 2) + X))
    with pytest.raises(TypeError):
        block(X)


@pytest.mark.parametrize("kind", [Shadowed, Captured])
def test_variables_of_functions_inside(kind: Any) -> None:
    stock, block = kind(), kind()
    gnt.convert(block)
    torch.testing.assert_close(block(X), stock(X), rtol=1e-5, atol=1e-5)
    if kind is Captured:
        torch.testing.assert_close(block.later(), stock.later())


def test_a_class_made_of_the_one_that_fuses_is_seen() -> None:
    block: Any = Plain()
    block.w = nn.Parameter(torch.ones(1))
    gnt.convert(block)
    nn.utils.parametrize.register_parametrization(block, "w", nn.Identity())
    assert not gnt.convert(block).changes
    assert "another class" in str(gnt.revert(block))
    torch.testing.assert_close(block(X), F.relu(F.group_norm(X, 2)))


@pytest.mark.parametrize("keeps", ["nothing", "it", "in a list", "by a hook"])
def test_values_that_a_model_keeps(keeps: str) -> None:
    model, found = Apart(keeps), []
    if keeps == "by a hook":
        model.first.register_forward_hook(lambda module, arguments, y: found.append(y))
    x = torch.randn(2, 3, 5, 6)
    before = torch.random.get_rng_state()
    report = gnt.convert(model, across_modules=True)
    assert torch.equal(before, torch.random.get_rng_state())
    assert report.count("fused") == (keeps == "nothing")
    assert keeps == "by a hook" or model.features == []
    found.clear()
    model(x)
    kept = {"it": model.features, "in a list": model.features, "by a hook": found}.get(keeps)
    if kept is not None:
        value = kept if isinstance(kept, torch.Tensor) else kept[0]
        assert value.min() < -0.3  # below that SiLU does not go


def test_an_activation_comes_back_in_the_mode_of_its_model() -> None:
    model = Apart("nothing")
    gnt.convert(model, across_modules=True)
    model.eval()
    gnt.revert(model)
    assert not any(module.training for module in model.modules())


def test_eps_of_a_batch_norm_counts() -> None:
    """Variances of eps' own size, as in nets with eps=1e-3."""
    norm = nn.BatchNorm2d(8, eps=1e-3).eval()
    norm.running_var.fill_(1e-3)  # type: ignore[union-attr]
    x = torch.randn(1, 8, 200, 200) * 1e-3**0.5
    want = norm(x)
    gnt.convert(nn.Sequential(norm), batch_norm=True)
    torch.testing.assert_close(norm(x), want, rtol=0.02, atol=0.02)


def test_what_a_batch_norm_has_of_its_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    norm: Any = nn.BatchNorm2d(4)
    norm.activation = nn.ReLU()
    assert "called activation" in str(gnt.convert(nn.Sequential(norm), batch_norm=True))
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x)
    assert "replaced" in str(gnt.convert(nn.Sequential(nn.BatchNorm2d(4)), batch_norm=True))


def test_pytorchs_own_sequential_may_be_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    old = nn.Sequential.forward
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: 3 * old(self, x))
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())
    gnt.convert(model)
    torch.testing.assert_close(model(X), 3 * F.relu(F.group_norm(X, 2)))


def test_moments_of_one_shape() -> None:
    m = gnt.moments(X, 2)
    bad = gnt.Moments(m.count, m.mean, m.m2[:1])
    for x in (X, X.clone().requires_grad_()):
        with pytest.raises(gnt.ShapeError if hasattr(gnt, "ShapeError") else ValueError, match="one shape"):
            gnt.normalize(x, bad)
    with pytest.raises(ValueError, match="one shape"):
        m + bad


def test_batch_norms_that_share_their_weight_are_left_alone() -> None:
    a, b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    b.weight = a.weight
    report = gnt.convert(nn.Sequential(a, b), batch_norm=True)
    assert report.count("skipped") == 2
    assert "shares" in str(report)
