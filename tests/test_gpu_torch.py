"""The way of tensors to the GPU engine, with tensors in host memory and Triton's interpreter behind it."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.9")

import torch

import groupnorm.torch as gnt
from groupnorm._engines.gpu.compiler import INTERPRETED
from groupnorm._engines.gpu.plan import REGIMES
from groupnorm.bench.cases import Case
from groupnorm.bench.gpu import options, verify
from groupnorm.bench.gpu.full_size import check_case
from groupnorm.torch import call, composite, gpu

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 from the start"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
FORMATS = [None, torch.channels_last, torch.channels_last_3d]


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: Any) -> Iterator[list[Any]]:
    """Tensors in host memory go to the GPU engine; gives what it planned."""
    planned: list[Any] = []

    def fit(*arguments: Any) -> Any:
        found = original(*arguments)
        planned.append(found)
        return found

    original = gpu.fit
    monkeypatch.setattr(gpu, "fit", fit)
    monkeypatch.setattr(gpu, "_HOST_TOO", True)
    call._kinds.clear()
    yield planned
    call._kinds.clear()


def tensor(*shape: int, format_: Any = None, dtype: Any = torch.float32, grad: bool = True) -> Any:
    made = torch.randn(shape).to(dtype)
    return (made if format_ is None else made.to(memory_format=format_)).requires_grad_(grad)


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forward_and_backward_as_pytorch(on_gpu: list[Any], format_: Any, dtype: Any) -> None:
    shape = (2, 8, 3, 4, 5) if format_ is torch.channels_last_3d else (2, 8, 6, 5)
    x, weight, bias = tensor(*shape, format_=format_, dtype=dtype), tensor(8), tensor(8)
    y = gnt.group_norm(x, 4, weight, bias, activation="silu")
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, weight, bias), dy)
    wanted = torch.nn.functional.silu(torch.nn.functional.group_norm(x.float(), 4, weight, bias))
    want = torch.autograd.grad(wanted, (x, weight, bias), dy.float())
    assert any(found.plan is not None for found in on_gpu)
    assert y.stride() == torch.nn.functional.group_norm(x.float(), 4).stride()
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float16 else {"atol": 1e-5, "rtol": 1e-5}
    for a, b in zip((y, *got), (wanted, *want), strict=True):
        torch.testing.assert_close(a.float(), b.float(), **tolerance)


def test_every_option() -> None:
    x, residual = tensor(2, 8, 6, 5), tensor(2, 8, 6, 5)
    weight, bias, scale, shift = tensor(8), tensor(8), tensor(2, 8), tensor(2, 8)
    mask = torch.rand(2, 6, 5) < 0.7
    given = (x, weight, bias, scale, shift, residual)
    options = {"scale": scale, "shift": shift, "residual": residual, "mask": mask}
    y = gnt.group_norm(x, 4, weight, bias, activation="gelu", **options)
    wanted = composite.group_norm(x, 4, weight, bias, 1e-5, "gelu", scale, shift, residual, mask)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    dy = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, given, dy), torch.autograd.grad(wanted, given, dy), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_only_the_gradients_that_are_needed() -> None:
    x, weight, bias = tensor(2, 8, 6, 5, grad=False), tensor(8), tensor(8)
    y = gnt.group_norm(x, 4, weight, bias)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (weight, bias), dy)
    want = torch.autograd.grad(torch.nn.functional.group_norm(x, 4, weight, bias), (weight, bias), dy)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("view", ["sliced", "transposed", "expanded"])
def test_what_is_not_dense_is_packed(on_gpu: list[Any], view: str) -> None:
    x = tensor(2, 8, 6, 10, grad=False)
    x = {"sliced": x[..., ::2], "transposed": x.transpose(2, 3), "expanded": x[:, :, :1].expand(2, 8, 6, 10)}[view]
    y = gnt.group_norm(x, 4)
    torch.testing.assert_close(y, torch.nn.functional.group_norm(x, 4), atol=1e-5, rtol=1e-5)
    assert on_gpu[0].convert


def test_out_and_in_place() -> None:
    x = tensor(2, 8, 6, 5, grad=False)
    wanted = torch.nn.functional.group_norm(x, 4)
    out = torch.empty_like(x)
    assert gnt.group_norm(x, 4, out=out) is out
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    strided = torch.empty(2, 8, 6, 10)[..., ::2]
    torch.testing.assert_close(gnt.group_norm(x, 4, out=strided), wanted, atol=1e-5, rtol=1e-5)
    gnt.group_norm(x, 4, out=x)
    torch.testing.assert_close(x, wanted, atol=1e-5, rtol=1e-5)


def test_moments_and_normalize() -> None:
    x, weight = tensor(2, 8, 6, 5, grad=False), tensor(8, grad=False)
    parts = [gnt.moments(part.contiguous(), 4) for part in x.split(2, dim=2)]
    y = gnt.normalize(x, gnt.merge_moments(parts), weight)
    torch.testing.assert_close(y, torch.nn.functional.group_norm(x, 4, weight), atol=1e-5, rtol=1e-5)


def test_nothing_to_do() -> None:
    assert gnt.group_norm(torch.zeros(0, 4, 3), 2).shape == (0, 4, 3)


def test_a_model_trains() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU())
    x = torch.randn(2, 3, 6, 6)
    want = model(x)
    report = gnt.convert(model)
    assert report.count("fused") == 1
    got = model(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    got.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_results_lie_where_x_does() -> None:
    """Those, too, that `torch.empty_like` would lay differently."""
    kind = call.Kind(1, 1e-5, None, strides=(3, 1))
    assert call._empty(kind, torch.empty(2, 3, device="meta"))[0].is_meta


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_the_check_at_full_size_on_a_small_case(layout: str) -> None:
    """What `make test-gpu` does, so that its first hour on a GPU is not lost to a mistake in it."""
    found = check_case(Case("small", (2, 8, 6, 5), 4, "a test", "silu"), "float32", layout, 2, "cpu")
    assert {check.regime for check in found} == set(REGIMES) - ({"clustered"} if layout == "NHWC" else set())
    assert len({check.what for check in found}) == 8
    wrong = [check for check in found if check.failure is not None or not check.used <= 1]
    assert wrong == []


def test_the_check_of_options(monkeypatch: Any) -> None:
    monkeypatch.setattr(options, "_SHAPE", (2, 12, 6, 8))
    monkeypatch.setattr(options, "_GROUPS", 2)
    monkeypatch.setattr(options, "_ALLOWED", {name: options._ALLOWED[name] for name in ("float64", "float32")})
    found = options.check_options("cpu")
    wrong = [check for check in found if check.failure is not None or not check.used <= 1]
    assert wrong == []
    assert {check.regime for check in found} == {"any", *REGIMES} - {"clustered"}


def test_the_report_keeps_what_it_was_told(tmp_path: Any, capsys: Any) -> None:
    """At once: a device that hangs later takes nothing with it."""
    report = verify._Report(tmp_path / "new" / "gpu-checks.json", {"device": "a GPU"})
    report.add([verify.Check("y", "a case", "split", 0.5)])
    report.add(verify._tried("a case", lambda: 1 // 0))
    assert "WRONG runs: a case, any: ZeroDivisionError" in capsys.readouterr().out
    kept = json.loads(report.path.read_text(encoding="utf-8"))
    assert [check["used"] for check in kept["checks"]] == [0.5, float("inf")]
    report.show()
    assert "1 comparisons, worst 0.50 of what is allowed" in capsys.readouterr().out


def test_sanitizers_that_do_not_run_are_no_success(monkeypatch: Any, tmp_path: Any) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(verify.shutil, "which", lambda name: str(tool))
    assert [check.failure for check in verify._races(time.monotonic() + 60)] == ["it did not run"] * 3
    tool.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 2 errors'\nexit 9\n")
    assert [check.failure for check in verify._races(time.monotonic() + 60)] == ["ERROR SUMMARY: 2 errors"] * 3
    tool.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 0 errors'\n")
    assert [check.used for check in verify._races(time.monotonic() + 60)] == [0.0] * 3
    assert verify._races(time.monotonic()) == []


def test_the_engine_can_be_switched_off(monkeypatch: Any) -> None:
    monkeypatch.setenv("GROUPNORM_GPU", "off")
    gpu._is_here.cache_clear()
    assert not gpu.is_here()
    gpu._is_here.cache_clear()


@pytest.mark.parametrize("masked", [False, True])
def test_large_counts_are_whole_numbers(masked: bool, monkeypatch: Any) -> None:
    x = torch.randn(2, 6, 5, 7)
    mask = torch.rand(2, 5, 7) < 0.5 if masked else None
    found = gnt.moments(x, 2, mask=mask)
    monkeypatch.setattr(gpu, "_COUNTED", 0)
    again = torch.stack([torch.full_like(found.count, torch.nan), found.mean, found.m2], -1)
    gpu.count_exactly(again, x, mask)
    assert torch.equal(again[..., 0], found.count)


@pytest.mark.parametrize("lacks", ["triton", "its version", "capability"])
def test_what_the_engine_lacks_is_warned_of(lacks: str, monkeypatch: Any) -> None:
    words = "is not installed"
    if lacks == "triton":
        monkeypatch.setattr(gpu.util, "find_spec", lambda name: None)
    elif lacks == "its version":
        monkeypatch.setattr(gpu.metadata, "version", lambda name: "3.5.1")
        words = "got 3.5.1"
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (6, number))
        words = "got 6.1"
    gpu._is_here.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"{words}.*PyTorch's own operations"):
        assert not gpu.is_here()
    gpu._is_here.cache_clear()
