"""How the GPU engine plans: which regime for what, what a plan may not depend on, and what happens around launches."""

import subprocess
import sys
import threading
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest

import groupnorm as gn
from groupnorm._core.layout import Walk
from groupnorm._core.problem import Problem

pytest.importorskip("triton")

from groupnorm._engines import gpu
from groupnorm._engines.gpu import launch
from groupnorm._engines.gpu.compiler import INTERPRETED
from groupnorm._engines.gpu.device import Device, Limits, current_device
from groupnorm._engines.gpu.plan import REGIMES, make_plan
from groupnorm._engines.gpu.workspace import Workspace, _address
from groupnorm.bench.gpu.cases import GPU_CASES, LAYOUTS, problem_of
from groupnorm.bench.gpu.kernels import ARCHITECTURES

H200 = replace(ARCHITECTURES[90], clusters=True)
TASKS = ("forward", "backward")


def case(name: str) -> Any:
    return next(case for case in GPU_CASES if case.name == name)


@pytest.mark.parametrize(
    ("name", "layout", "regime"),
    [
        ("resnet50-conv2", "NCHW", "resident"),  # groups of 49 KB
        ("resnet50-conv5", "NHWC", "resident"),
        ("sd15-8", "NCHW", "resident"),
        ("sd15-64", "NCHW", "clustered"),  # 80 KB, 32 of them are too few for a program each
        ("sd15-64", "NHWC", "split"),
        ("vae-64", "NCHW", "clustered"),
        ("fpn-p3", "NCHW", "split"),  # 269 KB, of which a tile is 512
        ("vae-512", "NCHW", "split"),  # 2 MB
        ("vae-512-mid", "NCHW", "ticketed"),  # 4 MB, and 10 MB
        ("video-20", "NCHW", "ticketed"),
        ("video-20", "NHWC", "two_pass"),  # a slab of 64 bytes is 80 MB
        ("vae-1024", "NHWC", "two_pass"),
    ],
)
def test_regimes_of_real_shapes(name: str, layout: str, regime: str) -> None:
    problem = problem_of(case(name), "forward", layout, "bfloat16")
    plan = make_plan(problem, H200)
    assert plan.regime == regime
    if regime == "clustered":
        assert make_plan(problem, replace(H200, clusters=False)).regime == "split", "as Triton 3.6 has it"
    assert regime in str(plan)
    assert "because" in str(plan)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_is_cut_as_in_a_batch(task: str, layout: str) -> None:
    """Otherwise its bits would depend on its batch."""
    for one in GPU_CASES:
        for dtype in ("bfloat16", "float32"):
            problem = problem_of(one, task, layout, dtype)
            plans = [make_plan(replace(problem, N=n), H200) for n in (1, 2, 64)]
            for launches in zip(*(plan.launches for plan in plans), strict=True):
                if launches[0].kernel != "parameter_gradients":  # which adds up the samples
                    assert all(found.constants == launches[0].constants for found in launches)
                    assert len({found.warps for found in launches}) == 1
                    assert len({found.numbers.get("tiles") for found in launches}) == 1


def test_plans_fit_what_they_are_for() -> None:
    """Split never needs more programs than run at once; parts cover their slab."""
    for one in GPU_CASES:
        for layout in LAYOUTS:
            for task in TASKS:
                for device in ARCHITECTURES.values():
                    problem = problem_of(one, task, layout, "float32")
                    plan = make_plan(problem, device)
                    first = plan.launches[0]
                    constants = first.constants
                    tile = constants["ROWS"] * constants["COLS"]
                    if plan.regime in ("resident", "clustered"):
                        assert tile * first.grid[0] >= problem.N * problem.C * problem.S
                    else:
                        assert first.numbers["across"] * constants["COLS"] * first.numbers.get("tiles", 1) >= problem.S
                    if plan.regime == "split" and first.cooperative:
                        assert first.grid[0] * first.grid[1] * first.warps <= 16 * device.multiprocessors


def test_a_regime_is_obeyed_or_refused() -> None:
    problem = problem_of(case("vae-1024"), "forward", "NHWC", "bfloat16")
    assert make_plan(problem, H200, "two_pass").regime == "two_pass"
    with pytest.raises(gn.EngineError, match="resident regime cannot"):
        make_plan(problem, H200, "resident")


def test_without_what_was_refused() -> None:
    problem = problem_of(case("sd15-64"), "forward", "NCHW", "bfloat16")
    assert make_plan(problem, H200, without=frozenset({"clustered"})).regime == "split"
    assert make_plan(problem, H200, without=frozenset({"clustered", "split"})).regime == "ticketed"
    backward = replace(problem_of(case("sd15-64"), "backward", "NCHW", "bfloat16"), stats=False)
    plan = make_plan(backward, H200, without=frozenset({"clustered"}))
    assert plan.statistics is not None
    assert {plan.regime, plan.statistics.regime} & {"clustered"} == set()


@pytest.mark.parametrize("regimes", [["clustered"], ["split"], ["clustered", "split"]], ids=str)
def test_a_refused_launch_takes_another_road(monkeypatch: Any, regimes: list[str]) -> None:
    if not INTERPRETED:
        pytest.skip("with the interpreter")
    limits = Limits(held=128, held_backward=128, part=256, part_backward=256, together=64)
    small = Device(0, "small", 90, 4, 1 << 20, limits=limits, clusters="clustered" in regimes)
    refused = []

    def run(plan: Any, *arguments: Any) -> None:
        if plan.regime in regimes:
            refused.append(plan)
            raise launch.TooLargeError("it does not fit")
        launch.run(plan, *arguments)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "plan", lambda problem, threads: make_plan(problem, small))
    gn.numpy._calls.clear()
    x = np.random.default_rng(0).standard_normal((1, 4, 200)).astype(np.float32)
    with pytest.warns(RuntimeWarning, match="regime is not used for forward"):
        assert np.allclose(gn.group_norm(x, 2, impl="gpu"), gn.group_norm(x, 2), atol=1e-5)
    assert np.allclose(gn.group_norm(x, 2, impl="gpu"), gn.group_norm(x, 2), atol=1e-5)
    assert [plan.regime for plan in refused] == regimes, "once is enough"
    gn.numpy._calls.clear()


def test_a_refusal_of_a_later_launch(monkeypatch: Any) -> None:
    """The device may be full the second time only."""
    device = replace(current_device(), multiprocessors=4, limits=Limits(held=64, part=64))
    problem = Problem("forward", "float32", 1, 4, 200, 2, walks=dict.fromkeys(("x", "y"), Walk(800, 200, 1)))
    plan = make_plan(problem, device, "split")

    def refuse(addresses: tuple[int, ...], stream: int) -> None:
        raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    addresses = (0,) * len(launch.ARRAYS)
    plan.ready[0, True, (True,) * len(addresses)] = [refuse for _ in plan.launches]
    cooperative = replace(plan, launches=tuple(replace(one, cooperative=True) for one in plan.launches))
    with pytest.raises(launch.TooLargeError):
        launch.run(cooperative, addresses, True, 0, 0)


def test_what_a_refusal_looks_like() -> None:
    plan = make_plan(problem_of(case("sd15-64"), "forward", "NCHW", "bfloat16"), H200)
    (clustered,) = plan.launches
    (plain,) = make_plan(problem_of(case("sd15-8"), "forward", "NCHW", "bfloat16"), H200).launches
    said = "Triton Error [CUDA]: a kernel launch error has occurred due to cluster misconfiguration"
    launch._raise_if_too_large(plain, RuntimeError(said))
    launch._raise_if_too_large(clustered, RuntimeError("Triton Error [CUDA]: cluster target block not present"))
    with pytest.raises(launch.TooLargeError, match="does not fit the device"):
        launch._raise_if_too_large(clustered, RuntimeError(said))
    tried: list[Any] = []
    launch.compiler_options(clustered, lambda options: tried.append(options) or (100, 0))
    assert [options["num_ctas"] for options in tried] == [clustered.multiprocessors]


def test_a_cluster_holds_one_group() -> None:
    """Also where it is forced, as the check on a GPU does with small shapes: groups are not gathered across one."""
    for one in GPU_CASES:
        for task in TASKS:
            problem = problem_of(one, task, "NCHW", "float32")
            try:
                plan = make_plan(problem, H200, "clustered")
            except gn.EngineError:
                continue
            assert plan.launches[0].constants["GROUPS"] == 1


def test_every_regime_takes_a_small_problem() -> None:
    walk = Walk(8 * 100, 100, 1)
    problem = Problem("forward", "float32", 2, 8, 100, 4, walks={"x": walk, "y": walk})
    assert {make_plan(problem, current_device(), regime).regime for regime in REGIMES} == set(REGIMES)


@pytest.mark.parametrize("task", ["forward", "backward"])
@pytest.mark.parametrize("C", [1 << 14, 1 << 16, 1 << 20])
def test_many_channels_of_one_position_are_cut(task: str, C: int) -> None:
    walk = Walk(C, 1, 1)
    walks = dict.fromkeys(("x", "y") if task == "forward" else ("x", "dy", "dx"), walk)
    problem = Problem(task, "float32", 4, C, 1, 1, weight="float32", bias="float32", walks=walks)
    plan = make_plan(problem, H200)
    for one in plan.launches:
        tile = one.constants.get("ROWS", 1) * one.constants.get("COLS", 1)
        assert tile <= one.multiprocessors << 15, f"{one.kernel}: {tile}"


def test_what_has_no_32_bit_places_or_rows_is_refused() -> None:
    S = 1 << 31
    problem = Problem("forward", "bfloat16", 1, 1, S, 1, walks=dict.fromkeys(("x", "y"), Walk(S, S, 1)))
    assert "2^31 positions" in str(gpu.supports(problem))
    C = 1 << 16
    last = Problem("forward", "bfloat16", 1, C, 4, 1, walks=dict.fromkeys(("x", "y"), Walk(4 * C, 1, C)))
    assert "channels last" in str(gpu.supports(last))


def test_large_batches_fit_the_grid() -> None:
    walk = Walk(32 * 4, 4, 1)
    problem = Problem("backward", "float32", 100_000, 32, 4, 8, scale="float32", shift="float32",
                      walks=dict.fromkeys(("x", "dy", "dx"), walk))  # fmt: skip
    for one in make_plan(problem, H200).launches:
        assert all(size < 1 << 16 for size in one.grid[1:]), one.kernel


def test_counters_are_zero_and_kept() -> None:
    if not INTERPRETED:
        pytest.skip("with the interpreter")
    memory = Workspace(0)
    first = memory.counters(10, 0, barrier=False)
    assert memory.counters(100, 0, barrier=False) == first, "a stream has one"
    assert memory.counters(10, 1, barrier=False) != first
    assert memory.counters(10, 0, barrier=True) != first, "a barrier leaves 2^31, what counts begins with 0"
    assert memory.counters(1 << 13, 0, barrier=False) != first, "unless it is too small"
    assert first in [_address(old[0]) for old in memory._outgrown if old], "which a launch may still use"


def test_counters_are_not_allocated_by_the_thread_that_asks(monkeypatch: Any) -> None:
    """Its allocations may go to the memory of a graph."""
    if not INTERPRETED:
        pytest.skip("with the interpreter")
    module, threads = import_module("groupnorm._engines.gpu.workspace"), []
    zeros = module._zeros
    monkeypatch.setattr(module, "_zeros", lambda *a: threads.append(threading.get_ident()) or zeros(*a))
    Workspace(0).counters(10, 0, barrier=False)
    assert threads
    assert threading.get_ident() not in threads


def test_what_the_short_launch_needs_of_triton() -> None:
    """A private interface: a version of Triton that changes it fails here, and then goes the public way."""
    import inspect

    from triton.compiler.compiler import CompiledKernel

    source = inspect.getsource(CompiledKernel)
    for name in ("packed_metadata", "function", "def run"):
        assert name in source
    from triton.runtime.jit import JITFunction

    call = inspect.getsource(JITFunction.run)
    assert "kernel.run(" in call
    assert "kernel.function, kernel.packed_metadata, launch_metadata" in call


BINDING = """
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from groupnorm._engines.gpu.launch import KERNELS, _Pointer

kernel = KERNELS["resident_forward"]
bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
given = {name: 1 for name in kernel.arg_names}
given |= {"X": _Pointer(64, "bfloat16"), "Y": _Pointer(8, "float32"), "WEIGHT": None}
_, types, _ = bind(**given, num_warps=4)
print([kind for kind, _ in types[:3]], [what for _, what in types[:2]])
"""


def test_addresses_are_what_triton_takes_for_tensors() -> None:
    found = run_compiling(BINDING)
    assert "['*bf16', '*fp32', 'constexpr']" in found
    assert "['D', " in found, "16 bytes divide the first address"
    assert "['D', 'D']" not in found


def run_compiling(script: str) -> str:
    """What a script prints in a process where Triton compiles instead of interpreting."""
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton_the_message_says_what_to_install(monkeypatch: Any) -> None:
    from groupnorm import _dispatch

    monkeypatch.setitem(_dispatch.ENGINES, "gpu", "no_such_package")
    with pytest.raises(gn.EngineError, match=r"pip install 'triton>=3.6'"):
        gn.group_norm(np.zeros((1, 2, 3), np.float32), 1, impl="gpu")


def test_host_memory_is_refused_without_the_interpreter(monkeypatch: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(gn.EngineError, match="takes arrays in GPU memory"):
        gn.group_norm(np.zeros((1, 2, 5), np.float32), 1, impl="gpu")
