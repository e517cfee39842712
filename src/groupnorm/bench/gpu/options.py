"""What the cases at full size do not have, on small shapes and on a device: mask, residual, scale and shift, float64,
a large mean, moments and given moments, a captured graph, a tensor that begins anywhere. In every regime; kernels
compile in seconds.
"""

from collections.abc import Iterator
from typing import Any

from groupnorm.bench.gpu.full_size import Check, forced

__all__ = ["check_options"]

Tensor = Any

_REGIMES = ("resident", "split", "ticketed", "two_pass")
_SHAPE, _GROUPS = (3, 24, 20, 24), 4
_NAMES = ("dx", "dweight", "dbias", "dscale", "dshift", "dresidual")
# What y and the gradients may be off, in the 2-norm: some roundings, and those of the type they are written in.
_ALLOWED = {"float64": 1e-12, "float32": 3e-6, "bfloat16": 8e-3, "float16": 1e-3}


def check_options(device: str = "cuda") -> list[Check]:
    """All comparisons."""
    found: list[Check] = []
    for layout in ("NCHW", "NHWC"):
        for dtype in _ALLOWED:
            for regime in _REGIMES:
                means = (0.0, 1000.0) if dtype == "float32" else (0.0,)
                for mean in means:
                    name = f"options {dtype} {layout}, mean {mean:g}"
                    try:
                        found += _all_options(name, dtype, layout, regime, mean, device)
                    except Exception as error:  # whatever a driver or a compiler says belongs into the table
                        found.append(_failed(name, regime, error))
        for check in (_moments, _anywhere, *([_captured] if device == "cuda" else [])):
            try:
                found += check(layout, device)
            except Exception as error:
                found.append(_failed(f"{check.__name__.strip('_')} {layout}", "any", error))
    return found


def _failed(name: str, regime: str, error: Exception) -> Check:
    return Check("runs", name, regime, float("inf"), f"{type(error).__name__}: {error}"[:200])


def _draw(dtype: str, layout: str, mean: float, device: str) -> dict[str, Tensor]:
    import torch

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    format_ = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    n, c = _SHAPE[:2]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(kind)

    x, residual, dy = (normal(*_SHAPE) for _ in range(3))
    return {
        "x": (x + mean).to(memory_format=format_), "weight": normal(c), "bias": normal(c), "scale": normal(n, c),
        "shift": normal(n, c), "residual": residual.to(memory_format=format_),
        "mask": torch.rand(n, *_SHAPE[2:], device=device) < 0.7, "dy": dy.to(memory_format=format_),
    }  # fmt: skip


def _exact(data: dict[str, Tensor], activation: str) -> dict[str, Tensor]:
    import torch

    from groupnorm.torch import composite

    with torch.enable_grad():
        given = [data[name].double().requires_grad_() for name in ("x", "weight", "bias", "scale", "shift", "residual")]
        x, weight, bias, scale, shift, residual = given
        mask = data["mask"]
        y = composite.group_norm(x, _GROUPS, weight, bias, 1e-5, activation, scale, shift, residual, mask)
        found = torch.autograd.grad(y, given, data["dy"].double())
    return {"y": y.detach(), **dict(zip(_NAMES, found, strict=True))}


def _all_options(name: str, dtype: str, layout: str, regime: str, mean: float, device: str) -> Iterator[Check]:
    """Everything that a call can have; and without dx, which one regime does."""
    from groupnorm.torch import call

    data = _draw(dtype, layout, mean, device)
    activation = "tanh" if mean == 0 else "hardswish"
    wanted = _exact(data, activation)
    x, weight, bias, scale, shift, residual, mask, dy = (
        data[key] for key in ("x", "weight", "bias", "scale", "shift", "residual", "mask", "dy")
    )
    with forced(regime):
        kind = call.kind_of(x, _GROUPS, weight, bias, 1e-5, activation, scale, shift, residual, mask, None)
        y, stats = call.forward(kind, x, weight, bias, scale, shift, residual, mask, None, True)
        all_of_them = (True,) * 6
        whole = call.backward(kind, dy, x, weight, bias, scale, shift, residual, mask, stats, all_of_them)
    yield _compared("y", name, regime, y, wanted["y"], dtype)
    without_dx = (False, *(True,) * 4, False)
    small = call.backward(kind, dy, x, weight, bias, scale, shift, residual, mask, stats, without_dx)
    for gradients, of in ((whole, regime), (small, "two_pass")):
        for what in _NAMES:
            given = getattr(gradients, what)
            if given is not None:
                yield _compared(what, name, of, given, wanted[what], dtype, 100 if mean else 1)


def _compared(what: str, name: str, regime: str, got: Tensor, want: Tensor, dtype: str, more: float = 1) -> Check:
    """more: how much more is allowed, for a slope that is taken at a z of which the mean's rounding is a part."""
    far = float((got.double() - want).norm() / want.norm())
    return Check(what, name, regime, far / (more * _ALLOWED[dtype]))


def _moments(layout: str, device: str) -> Iterator[Check]:
    """Moments, and y from them."""
    from groupnorm.torch import call, composite

    data = _draw("float32", layout, 10.0, device)
    x, mask = data["x"], data["mask"]
    found = call.moments(x, _GROUPS, mask)
    for name, got, want in zip(
        ("count", "mean", "m2"), found.unbind(2), composite.moments(x, _GROUPS, mask), strict=True
    ):
        yield _compared(name, f"moments {layout}", "any", got, want, "float32")
    whole = call.moments(x, _GROUPS, None)
    y = call.normalize(x, whole, data["weight"], None, 1e-5, None, None, None, None)
    want = composite.group_norm(x.double(), _GROUPS, data["weight"].double(), None, 1e-5, None, None, None, None, None)
    yield _compared("y", f"normalize {layout}", "any", y, want, "float32", 20)


def _anywhere(layout: str, device: str) -> Iterator[Check]:
    """A tensor that begins 4 bytes behind a multiple of 16."""
    import torch

    from groupnorm.torch import composite, group_norm

    x = _draw("float32", layout, 0.0, device)["x"]
    moved = torch.empty(x.numel() + 1, device=device)[1:].as_strided(x.shape, x.stride()).copy_(x)
    want = composite.group_norm(x.double(), _GROUPS, None, None, 1e-5, *[None] * 5)
    yield _compared("y", f"anywhere {layout}", "any", group_norm(moved, _GROUPS), want, "float32")


def _captured(layout: str, device: str) -> Iterator[Check]:
    """A graph, replayed with other data, twice."""
    import torch

    from groupnorm.torch import composite, group_norm

    x = _draw("float32", layout, 0.0, device)["x"]
    for regime in _REGIMES:
        with forced(regime):
            group_norm(x, _GROUPS)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = group_norm(x, _GROUPS)
            for turn in range(2):
                x.add_(torch.randn_like(x))
                graph.replay()
                torch.cuda.synchronize()
                want = composite.group_norm(x.double(), _GROUPS, None, None, 1e-5, *[None] * 5)
                yield _compared("y", f"graph, replay {turn}, {layout}", regime, y, want, "float32")
