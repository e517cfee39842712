"""What the GPU engine is held to: a case at full size, in every regime that can take it.

For a case, type and layout: y and the gradients against the formula in float64 on the same device; the same bits in
many repetitions with other work between them; a sample alone against the same sample in its batch; constant groups; NaN
in one group.

Budgets are the promises of docs/numerics.md: y as there, before its rounding to 16 bits; gradients at most twice as far
from the exact ones, in the 2-norm, as the plain formula in float32, and a rounding of their own type.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from groupnorm.bench.cases import Case

__all__ = ["Check", "check_case", "forced"]

Tensor = Any

_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
_FLOAT32 = 2.0**-24
_GRADIENTS = ("dx", "dweight", "dbias")
_STEEPEST = {None: 1.0, "relu": 1.0, "silu": 1.1}  # how far an activation stretches an error, of those in the cases


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: what, in which case and regime, how far of what is allowed (1 is the limit), or what went
    wrong.
    """

    what: str
    case: str
    regime: str
    used: float
    failure: str | None = None


def check_case(case: Case, dtype: str, layout: str, repeats: int, device: str = "cuda") -> list[Check]:
    """All comparisons of a case in one type and layout."""
    from groupnorm._engines.gpu import INSTEAD
    from groupnorm._engines.gpu.device import current_device
    from groupnorm._engines.gpu.plan import REGIMES, make_plan
    from groupnorm.bench.gpu.cases import problem_of
    from groupnorm.errors import EngineError

    name = f"{case.name} {dtype} {layout}"
    data = _data(case, dtype, layout, device)
    if case.activation == "relu":
        _leave_out_doubtful_slopes(case, data)
    wanted = _exact(case, data)
    found: list[Check] = []
    for regime in REGIMES:
        try:
            for task in ("forward", "backward"):
                make_plan(problem_of(case, task, layout, dtype), current_device(), regime)
        except EngineError:
            continue
        try:
            with forced(regime) as made:
                results = _compare(case, data, wanted, dtype, regime, name, repeats)
            if any(INSTEAD in plan.ready for plan in made):  # what was compared is another regime's
                results = [Check("runs", name, regime, float("inf"), "the device refused the launch")]
            found += results
        except Exception as error:  # whatever a driver or a compiler says belongs into the table
            found.append(Check("runs", name, regime, float("inf"), f"{type(error).__name__}: {error}"[:200]))
    return found


def _data(case: Case, dtype: str, layout: str, device: str) -> dict[str, Tensor]:
    import torch

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    format_ = torch.contiguous_format
    if layout == "NHWC":
        format_ = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(case.shape), format_)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(kind)

    channels = case.shape[1]
    column = (channels, *[1] * (len(case.shape) - 2))
    x = torch.randn(case.shape, device=device) + torch.rand(column, device=device)  # channels differ in their means
    return {"x": x.to(kind).to(memory_format=format_), "dy": normal(*case.shape).to(memory_format=format_),
            "weight": normal(channels), "bias": normal(channels)}  # fmt: skip


def _leave_out_doubtful_slopes(case: Case, data: dict[str, Tensor]) -> None:
    """dy is 0 where z is so near to 0 that a rounding decides whether ReLU's slope is 0 or 1: one of 10^7 elements on
    the other side is 3e-4 of the gradient, and no error.
    """
    from groupnorm.torch import composite

    x, weight, bias = (data[name].double() for name in ("x", "weight", "bias"))
    z = composite.group_norm(x, case.num_groups, weight, bias, case.eps, *[None] * 5)
    data["dy"].masked_fill_(z.abs() <= 64 * _FLOAT32 * (1 + z.abs().amax()), 0)


def _formula(case: Case, data: dict[str, Tensor], kind: Any) -> dict[str, Tensor]:
    """y and gradients by PyTorch's own operations, in another type."""
    import torch

    from groupnorm.torch import composite

    with torch.enable_grad():
        given = {name: tensor.to(kind).requires_grad_(name != "dy") for name, tensor in data.items()}
        inputs = given["x"], given["weight"], given["bias"]
        x, weight, bias = inputs
        y = composite.group_norm(x, case.num_groups, weight, bias, case.eps, case.activation, *[None] * 4)
        found = torch.autograd.grad(y, inputs, given["dy"])
    return {"y": y.detach(), **dict(zip(_GRADIENTS, found, strict=True))}


def _exact(case: Case, data: dict[str, Tensor]) -> dict[str, Any]:
    """y and gradients in float64, what y's budget is a part of, and how far the plain formula in float32 is from the
    gradients.
    """
    import torch

    exact, plain = (_formula(case, data, kind) for kind in (torch.float64, torch.float32))
    reached = {name: _distance(plain[name], exact[name]) for name in _GRADIENTS}
    x = data["x"].double()
    flat = x.reshape(case.shape[0], case.num_groups, -1)
    mean, std = flat.mean(2, keepdim=True), flat.std(2, correction=0, keepdim=True)
    xhat = ((flat - mean) / std).reshape(case.shape)
    column = (1, -1, *[1] * (len(case.shape) - 2))
    weight, bias = data["weight"].double().abs().view(column), data["bias"].double().abs().view(column)
    size = (weight * xhat.abs() + bias + weight).reshape(flat.shape) * (1 + mean.abs() / std)
    return {**exact, "size": size.reshape(case.shape), "reached": reached}


def _distance(found: Tensor, exact: Tensor) -> float:
    """The 2-norm of the error, as a part of what is exact."""
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@contextmanager
def forced(regime: str) -> Iterator[list[Any]]:
    """All plans for y and dx are in this regime; gives those that were made."""
    import groupnorm._engines.gpu as engine
    from groupnorm._engines.gpu.device import current_device
    from groupnorm._engines.gpu.plan import make_plan
    from groupnorm.torch import call

    made: list[Any] = []

    def plan(problem: Any, num_threads: int) -> Any:
        made.append(make_plan(problem, current_device(), regime))
        return made[-1]

    before = engine.plan
    engine.plan = plan
    call._kinds.clear()
    try:
        yield made
    finally:
        engine.plan = before
        call._kinds.clear()


def _run(case: Case, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and backward by the engine."""
    from groupnorm.torch import call

    x, weight, bias = data["x"], data["weight"], data["bias"]
    kind = call.kind_of(x, case.num_groups, weight, bias, case.eps, case.activation, None, None, None, None, None)
    y, stats = call.forward(kind, x, weight, bias, None, None, None, None, None, True)
    needs = (True, True, True, False, False, False)
    found = call.backward(kind, data["dy"], x, weight, bias, None, None, None, None, stats, needs)
    return {"y": y, "dx": found.dx, "dweight": found.dweight, "dbias": found.dbias, "stats": stats}


def _compare(
    case: Case, data: dict[str, Tensor], wanted: dict[str, Tensor], dtype: str, regime: str, name: str, repeats: int
) -> list[Check]:
    import torch

    from groupnorm.torch import composite

    got = _run(case, data)
    unit = _UNIT[dtype]
    rounding = 0.0 if dtype == "float32" else unit
    size, y = wanted["size"] * _STEEPEST[case.activation], wanted["y"]
    info = torch.finfo(getattr(torch, dtype))
    smallest = info.smallest_normal * info.eps / 2 if rounding else 1e-30  # what rounding takes from subnormal numbers
    allowed = 4 * _FLOAT32 * (size + y.abs()) + rounding * y.abs() + smallest
    found = [Check("y", name, regime, ((got["y"].double() - y).abs() / allowed).max().item())]
    for gradient in _GRADIENTS:
        most = 2 * max(wanted["reached"][gradient], _FLOAT32) + rounding
        found.append(Check(gradient, name, regime, _distance(got[gradient], wanted[gradient]) / most))
    other = torch.empty(64 << 20, dtype=torch.uint8, device=data["x"].device)  # what lies in L2 is to differ
    for again in range(repeats):
        if again % 7 == 0:
            other.fill_(again & 255)
        now = _run(case, data)
        wrong = [key for key in got if not torch.equal(got[key], now[key])]
        if wrong:
            found.append(Check("same bits", name, regime, float("inf"), f"{', '.join(wrong)} differ in run {again}"))
            break
    else:
        found.append(Check("same bits", name, regime, 0.0))
    if case.shape[0] > 1:
        alone = {key: tensor[:1].clone(memory_format=torch.preserve_format) if tensor.dim() > 1 else tensor
                 for key, tensor in data.items()}  # fmt: skip
        one = _run(case, alone)
        same = torch.equal(one["y"], got["y"][:1]) and torch.equal(one["dx"], got["dx"][:1])
        found.append(
            Check("a sample alone", name, regime, 0.0 if same else float("inf"), None if same else "other bits")
        )
    broken = data["x"].clone(memory_format=torch.preserve_format)
    broken[(0,) * broken.dim()] = float("nan")
    now, size = _run(case, {**data, "x": broken})["y"], (case.shape[0], case.num_groups, -1)
    intact = torch.isclose(now, got["y"], rtol=0, atol=0).reshape(size).all(2)
    lost = not now.reshape(size)[0, 0].isnan().all() or int((~intact).sum()) != 1
    found.append(Check("NaN in one group", name, regime, float("inf") if lost else 0.0, "in others" if lost else None))
    constant = _run(case, {**data, "x": torch.full_like(data["x"], 1234.5)})["y"]
    bias = data["bias"].view(1, -1, *[1] * (len(case.shape) - 2)).float()
    expected = bias if case.activation is None else composite.ACTIVATIONS[case.activation](bias)
    used = ((constant.float() - expected).abs() / (2 * unit * expected.abs() + 1e-6)).max().item()
    return [*found, Check("a constant group", name, regime, used)]
