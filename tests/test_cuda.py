"""The front end for other libraries' arrays in GPU memory. NumPy's stand in for them, with Triton's interpreter behind:
they come and go by DLPack as CuPy's do.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

import groupnorm as gn

pytest.importorskip("triton", minversion="3.9")
torch = pytest.importorskip("torch")

import groupnorm.cuda as gnc  # noqa: E402
from groupnorm._engines.gpu.compiler import INTERPRETED  # noqa: E402
from groupnorm.torch import call, gpu  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 from the start"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.fixture
def on_gpu(monkeypatch: Any) -> Iterator[None]:
    """Arrays in host memory go to the GPU engine."""
    monkeypatch.setattr(gpu, "_HOST_TOO", True)
    call._kinds.clear()
    yield
    call._kinds.clear()


def arrays(shape: tuple[int, ...], layout: str, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    n, c = shape[0], shape[1 if layout == "NCHW" else -1]
    spatial = shape[2:] if layout == "NCHW" else shape[1:-1]
    sizes = {"x": shape, "weight": (c,), "bias": (c,), "scale": (n, c), "shift": (n, c), "residual": shape}
    made = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    return {**made, "mask": rng.random((n, *spatial)) < 0.8}


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 8, 5, 6), "NCHW"), ((2, 5, 6, 8), "NHWC"), ((2, 30, 8), "NHWC"), ((1, 3, 4, 5, 8), "NHWC"), ((3, 8), "NHWC")],
)
def test_as_the_numpy_front_end(on_gpu: None, shape: tuple[int, ...], layout: str) -> None:
    given = arrays(shape, layout)
    if len(shape) == 2:
        given["mask"] = np.ones(3, bool)
    x = given.pop("x")
    options = {"layout": layout, "activation": "silu", **given}
    y, mean, rstd = gnc.group_norm(x, 4, **options, return_stats=True)
    wanted = gn.group_norm(x, 4, **options, return_stats=True)
    assert isinstance(y, np.ndarray)
    for got, want in zip((y, mean, rstd), wanted, strict=True):
        assert got.shape == want.shape
        assert np.allclose(got, want, atol=1e-5)
    dy = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    want = gn.group_norm_vjp(dy, x, 4, **options)
    for stats in ({}, {"mean": mean, "rstd": rstd}):
        for got, gradient in zip(gnc.group_norm_vjp(dy, x, 4, **options, **stats), want, strict=True):
            assert got.shape == gradient.shape
            assert np.allclose(got, gradient, atol=1e-4)


def test_channels_last_is_not_copied(on_gpu: None, monkeypatch: Any) -> None:
    """Neither on the way in nor on the way out."""
    x = arrays((2, 5, 6, 8), "NHWC")["x"]
    seen = []
    forward = call.forward

    def watch(kind: Any, **given: Any) -> Any:
        seen.append((given["x"].data_ptr(), bool(kind.convert)))
        return forward(kind, **given)

    monkeypatch.setattr(call, "forward", watch)
    y = gnc.group_norm(x, 4, layout="NHWC")
    assert seen == [(x.ctypes.data, False)]
    assert y.flags.c_contiguous


def test_out_is_filled(on_gpu: None) -> None:
    x = arrays((2, 5, 6, 8), "NHWC")["x"]
    out = np.empty_like(x)
    assert gnc.group_norm(x, 4, layout="NHWC", out=out) is out
    assert np.allclose(out, gn.group_norm(x, 4, layout="NHWC"), atol=1e-5)
    with pytest.raises(gn.ShapeError, match="out must be contiguous"):
        gnc.group_norm(x, 4, layout="NHWC", out=np.empty((5, 2, 6, 8), np.float32).swapaxes(0, 1))


def test_out_that_overlaps_x(on_gpu: None) -> None:
    """A storage of DLPack begins where the array does, not where its memory does."""
    memory = np.random.default_rng(0).standard_normal((3, 4, 50)).astype(np.float32)
    x, out = memory[:2], memory[1:]
    want = gn.group_norm(x.copy(), 2)
    assert np.allclose(gnc.group_norm(x, 2, out=out), want, atol=1e-5)
    same = memory[:2]
    want = gn.group_norm(same.copy(), 2)
    assert np.allclose(gnc.group_norm(same, 2, out=same), want, atol=1e-5)


def test_backward_is_the_first_three(on_gpu: None) -> None:
    x, weight = np.ones((1, 4, 3), np.float32), np.ones(4, np.float32)
    dx, dweight, dbias = gnc.group_norm_backward(x, x, 2, weight, activation="relu")
    assert dx.shape == x.shape
    assert dweight.shape == (4,)
    assert dbias is None


def test_nothing_in_the_batch(on_gpu: None) -> None:
    x = np.empty((0, 3, 8), np.float32)
    assert gnc.group_norm(x, 4, layout="NHWC").shape == x.shape


class WithoutDLPack:
    """As Numba's device arrays are: their library does not read DLPack."""


def test_a_library_without_dlpack_gets_tensors() -> None:
    tensor = torch.ones(2, 3)
    assert gnc._given(tensor, WithoutDLPack()) is tensor


def test_bad_input(on_gpu: None) -> None:
    x = np.ones((1, 4, 3), np.float32)
    with pytest.raises(gn.DtypeError, match="neither __dlpack__ nor __cuda_array_interface__"):
        gnc.group_norm([1.0], 1)
    with pytest.raises(gn.DtypeError, match="x must be an array: got None"):
        gnc.group_norm(None, 1)
    with pytest.raises(gn.ShapeError, match=r"residual must have the shape \(1, 3, 4\)"):
        gnc.group_norm(x.swapaxes(1, 2), 2, layout="NHWC", residual=x)
    with pytest.raises(gn.ShapeError, match="weight must have the shape"):
        gnc.group_norm(x, 2, np.ones(3, np.float32))
    with pytest.raises(gn.ShapeError, match=r"dy must have the shape \(1, 4, 3\)"):
        gnc.group_norm_vjp(x[:, :2], x, 2)
    with pytest.raises(gn.DtypeError, match="dy must be an array of x's shape: got None"):
        gnc.group_norm_vjp(None, x, 2)
    with pytest.raises(gn.DtypeError, match="dy must be of type float16 or bfloat16"):
        gnc.group_norm_vjp(x.astype(int), x, 2)
    with pytest.raises(gn.ShapeError, match=r"rstd must have the shape \(1, 2\): got \(1, 3\)"):
        gnc.group_norm_vjp(x, x, 2, mean=np.ones((1, 2), np.float32), rstd=np.ones((1, 3), np.float32))
    with pytest.raises(gn.DtypeError, match="mean must be of type float32"):
        gnc.group_norm_vjp(x, x, 2, mean=np.ones((1, 2)), rstd=np.ones((1, 2)))
    with pytest.raises(gn.ShapeError, match="x must have no negative strides"):
        gnc.group_norm(x[:, ::-1], 2)
    with pytest.raises(gn.ShapeError, match="mean and rstd belong together"):
        gnc.group_norm_vjp(x, x, 2, mean=np.ones((1, 2), np.float32))
    with pytest.raises(gn.OptionError, match="layout"):
        gnc.group_norm(x, 2, layout="NWHC")


def test_host_memory_is_refused() -> None:
    x = np.ones((1, 4, 3), np.float32)
    for array in (x, torch.from_numpy(x)):
        with pytest.raises(gn.EngineError, match="x must lie in GPU memory"):
            gnc.group_norm(array, 2)


class OnGPU:
    """What the NumPy front end sees of an array in GPU memory."""

    __cuda_array_interface__: ClassVar = {"shape": (1, 2, 3), "typestr": "<f4", "data": (0, False), "version": 3}


def test_the_numpy_front_end_says_where_to_go() -> None:
    with pytest.raises(gn.DtypeError, match=r"in GPU memory; use groupnorm\.cuda, or groupnorm\.torch"):
        gn.group_norm(OnGPU(), 1)
