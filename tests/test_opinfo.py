"""PyTorch's own samples for nn.functional.group_norm, through our functions, against PyTorch in float64.

PyTorch's generator means to leave weight and bias away in turn, but each round takes the arguments of the round before,
so that all its samples have both. Here every sample is therefore repeated with each of them left away.
"""

from itertools import product
from typing import Any

import numpy as np
import pytest

import groupnorm as gn

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")
methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")

OPERATOR = next(op for op in methods.op_db if op.name == "nn.functional.group_norm")
TYPES = {"float64": (torch.float64, 1e-11), "float32": (torch.float32, 2e-5)}
DTYPES = [*TYPES, "float16", "bfloat16"]
ENGINES = ("reference", "cpu")


def samples(dtype: Any, source: str) -> list[Any]:
    """(input, groups, weight, bias, eps), each sample in four versions."""
    torch.manual_seed(0)
    generate = {"sample": OPERATOR.sample_inputs, "reference": OPERATOR.reference_inputs}[source]
    found: dict[Any, Any] = {}
    for s in generate("cpu", dtype):
        weight, bias = (s.kwargs.get(name) for name in ("weight", "bias"))
        eps = s.kwargs.get("eps", 1e-5)
        for w, b in product((weight, None), (bias, None)):
            key = (tuple(s.input.shape), s.args[0], eps, w is None, b is None)
            found.setdefault(key, (s.input, s.args[0], w, b, eps))
    return list(found.values())


def array(tensor: Any) -> Any:
    if tensor is None:
        return None
    if tensor.dtype == torch.bfloat16:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        return tensor.detach().float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def test_the_samples_are_what_we_think() -> None:
    """If PyTorch mends its generator, or empties it, this says so."""
    given = [(s.kwargs.get("weight"), s.kwargs.get("bias")) for s in OPERATOR.sample_inputs("cpu", torch.float64)]
    assert len(given) >= 10
    assert len(samples(torch.float64, "sample")) >= 20
    assert {(w is None, b is None) for _, _, w, b, _ in samples(torch.float64, "sample")} == set(
        product((True, False), repeat=2)
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("source", ["sample", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype: str, source: str, engine: str) -> None:
    tolerance = TYPES[dtype][1] if dtype in TYPES else {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    for x, groups, weight, bias, eps in samples(getattr(torch, dtype), source):
        where = f"{tuple(x.shape)} groups={groups} eps={eps} weight={weight is not None} bias={bias is not None}"
        parameters = {"weight": array(weight), "bias": array(bias)}
        if eps < 0:  # PyTorch takes the root of a negative number here; we refuse
            with pytest.raises(gn.OptionError, match="eps"):
                gn.group_norm(array(x), groups, **parameters, eps=eps, impl=engine)
            continue
        leaves = [t.detach().double().requires_grad_() if t is not None else None for t in (x, weight, bias)]
        # Ones for no weight: PyTorch's backward fails for a bias without a weight ("tensor does not have a device").
        ones = torch.ones(x.shape[1], dtype=torch.float64) if weight is None else leaves[1]
        want = torch.nn.functional.group_norm(leaves[0], groups, ones, leaves[2], eps)
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        want.backward(dy.double())
        y = gn.group_norm(array(x), groups, **parameters, eps=eps, impl=engine)
        # PyTorch's samples reach 9; with eps = 1e-5 and two values in a group, rstd stretches what rounding leaves.
        assert y.dtype.name == dtype, where
        np.testing.assert_allclose(y.astype(np.float64), want.detach(), rtol=tolerance, atol=tolerance, err_msg=where)
        got = gn.group_norm_vjp(array(dy), array(x), groups, **parameters, eps=eps, impl=engine)
        for name, leaf in zip(("dx", "dweight", "dbias"), leaves, strict=True):
            g = getattr(got, name)
            assert (g is None) == (leaf is None), where
            if g is not None:
                w = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
                scale = max(1.0, float(np.abs(w).max(initial=0)))
                np.testing.assert_allclose(
                    g.astype(np.float64), w, rtol=2 * tolerance, atol=2 * tolerance * scale, err_msg=f"{name} {where}"
                )


def test_error_inputs() -> None:
    """What PyTorch refuses, we refuse, with an error of ours."""
    found = list(OPERATOR.error_inputs("cpu"))
    assert found
    for error in found:
        s = error.sample_input
        with pytest.raises(gn.GroupNormError) as caught:
            gn.group_norm(array(s.input), *s.args, **{name: array(t) for name, t in s.kwargs.items()})
        assert len(str(caught.value)) > 20


@pytest.mark.parametrize("groups", [0, -1, 3.0])
def test_groups_that_end_in_a_crash_elsewhere(groups: Any) -> None:
    """num_groups = 0 is a ZeroDivisionError in PyTorch."""
    with pytest.raises(gn.OptionError):
        gn.group_norm(np.ones((2, 6, 3), np.float32), groups)


@pytest.mark.parametrize("source", ["sample", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_as_tensors(dtype: str, source: str) -> None:
    import groupnorm.torch as gnt

    tolerance = TYPES[dtype][1] if dtype in TYPES else {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    for x, groups, weight, bias, eps in samples(getattr(torch, dtype), source):
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
        if eps < 0:
            with pytest.raises(gn.OptionError, match="eps"):
                gnt.group_norm(leaves[0], groups, *leaves[1:], eps)
            continue
        wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
        ones = torch.ones(x.shape[1], dtype=torch.float64) if weight is None else wide[1]
        want = torch.nn.functional.group_norm(wide[0], groups, ones, wide[2], eps)
        y = gnt.group_norm(leaves[0], groups, *leaves[1:], eps)
        assert y.dtype == x.dtype
        assert y.stride() == torch.nn.functional.group_norm(x.detach(), groups).stride()
        torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        y.backward(dy)
        want.backward(dy.double())
        for leaf, right in zip(leaves, wide, strict=True):
            if leaf is not None:
                scale = max(1.0, float(right.grad.abs().max()) if right.grad.numel() else 0.0)
                torch.testing.assert_close(leaf.grad.double(), right.grad, rtol=2 * tolerance,
                                           atol=2 * tolerance * scale)  # fmt: skip


def test_samples_of_the_module() -> None:
    """PyTorch's own ways of making and calling torch.nn.GroupNorm, with our class in its place."""
    import groupnorm.torch as gnt

    common_modules = pytest.importorskip("torch.testing._internal.common_modules")
    info = next(m for m in common_modules.module_db if m.module_cls is torch.nn.GroupNorm)
    found = info.module_inputs_func(info, "cpu", torch.float32, requires_grad=True, training=True)
    assert found
    for sample in found:
        made = sample.constructor_input
        ours, theirs = (kind(*made.args, **made.kwargs) for kind in (gnt.GroupNorm, torch.nn.GroupNorm))
        ours.load_state_dict(theirs.state_dict())
        given = sample.forward_input
        torch.testing.assert_close(ours(*given.args, **given.kwargs), theirs(*given.args, **given.kwargs))
        assert repr(ours) == repr(theirs)
