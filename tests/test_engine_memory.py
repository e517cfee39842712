"""The plans of the CPU engine, and its memory: recycled blocks for outputs, and nothing else of x's size."""

import gc
import sys
import threading
import time
from dataclasses import FrozenInstanceError
from importlib import import_module
from typing import Any

import numpy as np
import pytest

import groupnorm as gn
from groupnorm._core import buffers
from groupnorm._core.arguments import Options, prepare
from groupnorm._core.machine import CACHES
from groupnorm._engines import cpu
from programs import python

planning = import_module("groupnorm._engines.cpu.plan")  # the package has a function of that name
LARGE = (16, 32, 64, 64)  # 8 MiB: its output is a recycled block


def draw(shape: tuple[int, ...] = LARGE, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- plans -----------------------------------------------------------------------------------------------------------


def plan_of(task: str, shape: tuple[int, ...], groups: int, threads: int, layout: str = "NCHW", **options: Any) -> Any:
    x = np.empty(shape, options.pop("dtype", np.float32))
    arrays = {"x": x, **({"dy": x} if task == "backward" else {})}
    call, _ = prepare(Options(task, groups, 1e-5, layout, options.get("activation"), False), arrays)
    return planning.make_plan(call.problem, threads)


@pytest.mark.parametrize(
    ("task", "shape", "groups", "layout", "threads", "lines"),
    [
        ("forward", (8, 64, 32, 32), 8, "NCHW", 2, ["N=8 C=64 S=1024 G=8, float32, channels first", "road: whole"]),
        ("forward", (1, 8, 128, 130), 1, "NCHW", 2, ["road: phases", "launch 1: moments", "normalize, "]),
        ("backward", (1, 8, 128, 130), 1, "NCHW", 2, ["road: phases", "sums", "merge", "gradient"]),
        ("forward", (1, 128, 130, 8), 1, "NHWC", 2, ["channels last", "road: phases", "moments", "merge", "normalize"]),
        ("forward", (1, 8, 128, 130), 1, "NCHW", 1, ["road: whole", "1 threads"]),
        ("forward", (0, 8, 4), 2, "NCHW", 2, ["road: empty", "no elements"]),
        ("forward", (8, 64, 128, 128), 8, "NCHW", 2, ["past the cache"]),
        ("forward", (1, 8, 4, 4), 2, "NCHW", 2, ["through the cache", "on 1 threads"]),
    ],
)  # fmt: skip
def test_plan_explains_itself(
    task: str, shape: tuple[int, ...], groups: int, layout: str, threads: int, lines: list[str]
) -> None:
    text = str(plan_of(task, shape, groups, threads, layout))
    for line in lines:
        assert line in text, text
    assert text.splitlines()[0].startswith(f"{task}: N=")
    assert any(line.startswith("  because ") for line in text.splitlines())


def test_plan_is_frozen_and_a_pure_function() -> None:
    first, second = (plan_of("forward", (1, 8, 128, 130), 1, 2) for _ in range(2))
    assert str(first) == str(second)
    with pytest.raises((FrozenInstanceError, AttributeError)):
        first.road = "another"
    with pytest.raises((FrozenInstanceError, AttributeError)):
        first.launches[0].tasks = 1


def test_plan_is_made_once_for_each_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(cpu, "make_plan", lambda *a: made.append(a) or planning.make_plan(*a))
    shape = (3, 6, 7, 11)  # of no other test
    for seed in range(3):
        gn.group_norm(draw(shape, seed), 3)
    assert len(made) == 1
    gn.group_norm(draw(shape), 3, eps=1e-3)
    gn.group_norm(draw(shape)[:, :, ::-1], 3)
    assert len(made) == 3


def test_dz_is_kept_where_its_slopes_are_costly_and_it_fits_a_cache() -> None:
    def kept(shape: tuple[int, ...], groups: int, layout: str = "NCHW", **options: Any) -> int:
        plan: Any = plan_of(
            "backward", shape, groups, 2, layout, activation=options.pop("activation", "silu"), **options
        )
        assert bool(plan.kept) == ("computed once and kept" in str(plan))
        return int(plan.kept)

    small = kept((8, 64, 32, 32), 8)
    assert 0 < 8 * small <= 2 * 8 * 32 * 32 * 4 + 64, "a group for each thread"
    assert kept((64, 64, 32, 32), 8) == small, "not more for more samples"
    assert kept((8, 32, 32, 64), 8, "NHWC")
    assert not kept((8, 64, 32, 32), 8, activation="relu")
    assert not kept((8, 64, 32, 32), 8, activation=None)
    assert not kept((2, 4, 8 * CACHES.l3 // 1024, 64), 1)
    assert not kept((1, 4, 512, 512), 1), "phases keep nothing"


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("spatial", [(1,), (3, 3), (7, 7), (33, 20)])
def test_kept_dz_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, spatial: tuple[int, ...], dtype: Any, layout: str
) -> None:
    front = import_module("groupnorm.numpy")
    rng = np.random.default_rng(1)
    shape = (5, 40, *spatial) if layout == "NCHW" else (5, *spatial, 40)
    x, dy, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    weight, bias, mask = rng.standard_normal(40), rng.standard_normal(40), rng.random((5, *spatial)) < 0.7
    found = []
    for keeps in (False, True):
        monkeypatch.setattr(planning, "_keeps", lambda *_, keeps=keeps: keeps)
        monkeypatch.setattr(front, "_calls", {})
        for options in ({}, {"residual": residual, "mask": mask}):
            found.append(gn.group_norm_vjp(dy, x, 8, weight, bias, layout=layout, activation="silu", **options))
    for recomputed, kept in zip(found[:2], found[2:], strict=True):
        for a, b in zip(recomputed, kept, strict=True):
            assert (a is None and b is None) or a.tobytes() == b.tobytes()


# ---- memory ----------------------------------------------------------------------------------------------------------


def address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def test_dead_output_is_used_again_and_never_a_living_one() -> None:
    x = draw()
    gn.empty_cache()
    first = gn.group_norm(x, 8)
    where = address(first)
    view = first[1, 2:4]
    kept = view.copy()
    del first
    gc.collect()
    second = gn.group_norm(x * 2, 8)
    assert address(second) != where, "the block is still in use by a view"
    assert np.array_equal(view, kept)
    del view
    gc.collect()
    third = gn.group_norm(x, 8)
    assert address(third) == where
    assert where % 64 == 0
    del second, third


def test_views_of_all_kinds_keep_a_block() -> None:
    x = draw()
    gn.empty_cache()
    for keep in (
        memoryview,
        lambda a: a.reshape(-1)[5:],
        lambda a: np.frombuffer(a, np.uint8),
        lambda a: a.T.view(np.int32),
    ):
        y = gn.group_norm(x, 8)
        where, kept = address(y), keep(y)
        before = bytes(np.asarray(kept).tobytes())
        del y
        gc.collect()
        others = [gn.group_norm(x + i, 8) for i in range(3)]
        assert where not in map(address, others)
        assert np.asarray(kept).tobytes() == before
        del kept, others


def test_output_collected_on_another_thread() -> None:
    """A cycle that holds outputs may be collected anywhere, also inside the allocator itself."""
    x = draw()

    class Knot:
        def __init__(self) -> None:
            self.self, self.y = self, gn.group_norm(x, 8)

    want = gn.group_norm(x, 8)
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(6):
            Knot()
            if not np.array_equal(gn.group_norm(x, 8), want):
                wrong.append("changed")
            gc.collect()

    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    finally:
        gc.set_threshold(*before)
    assert not wrong


def test_a_new_block_takes_the_place_of_free_ones() -> None:
    """Outputs that grow leave nothing behind but what the last one needs."""
    gn.empty_cache()
    for megabytes in (8, 12, 16):
        gn.group_norm(np.zeros((1, 4, megabytes << 16), np.float32), 2)
        buffers._take_in()
        assert [span.size >> 20 for span in buffers._free] == [megabytes]
    gn.empty_cache()


def test_the_usual_allocator_is_asked_where_the_system_maps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> Any:
        raise OSError(12, "Cannot allocate memory")

    gn.empty_cache()
    monkeypatch.setattr(buffers, "_new_block", refuse)
    x = draw((2 * LARGE[0], *LARGE[1:]))
    y = gn.group_norm(x, 8)
    assert y.base.span is None
    assert (buffers._largest, buffers._held) == (0, 0)


def test_memory_from_the_usual_allocator_is_written_for_the_first_time_once() -> None:
    """Where streamed stores would be slow."""
    shape = (2 * LARGE[0], *LARGE[1:])
    gn.empty_cache()
    held = [buffers.empty(shape, np.dtype(np.float32)) for _ in range(2)]
    new = buffers.empty(shape, np.dtype(np.float32))
    assert new.flags.writeable
    assert new.base.span is None
    assert [buffers.first_write(new), buffers.first_write(new[1:]), buffers.first_write(new)] == [True, False, False]
    del held
    gn.empty_cache()


def test_two_outputs_of_the_largest_size_are_held_and_no_more() -> None:
    """In training every output stays: those after the second come from the usual allocator."""
    x = draw((2 * LARGE[0], *LARGE[1:]))
    gn.empty_cache()
    outputs = [gn.group_norm(x, 8) for _ in range(5)]
    assert buffers._held == 2 * x.nbytes
    assert [y.base.span is not None for y in outputs] == [True, True, False, False, False]
    assert all(np.array_equal(y, outputs[0]) for y in outputs)
    del outputs
    gc.collect()
    where = address(gn.group_norm(x[: len(x) // 2], 8))
    assert buffers._held == 2 * x.nbytes, "half an output is a piece of what is held"
    assert any(where == address(np.frombuffer(span.block, np.uint8)) for span in buffers._free)
    gn.empty_cache()
    assert not buffers._free
    assert buffers._held == 0


def test_small_outputs_share_a_block_that_is_whole_again_after_them() -> None:
    x = draw((2 * LARGE[0], *LARGE[1:]))
    gn.empty_cache()
    where = address(gn.group_norm(x, 8))
    gc.collect()
    pieces = [gn.group_norm(half, 8) for half in (x[: LARGE[0]], x[LARGE[0] :])]
    assert sorted(map(address, pieces)) == [where, where + pieces[0].nbytes]
    again = gn.group_norm(x, 8)
    assert address(again) != where, "both pieces are in use"
    assert np.array_equal(again, np.concatenate(pieces)), "pieces overlap"
    del again
    while pieces:
        pieces.pop()
        gc.collect()
    buffers._take_in()
    assert where in [span.block and address(np.frombuffer(span.block, np.uint8)) for span in buffers._free]
    assert all(span.size == len(span.block) for span in buffers._free)
    gn.empty_cache()


RSS = """
import numpy as np, groupnorm as gn, resource, sys
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
small = np.ones((4, 32, 64, 64), 'f4')
{warm}
x = np.ones((16, 64, 128, 128), 'f4')  # 64 MiB
before = peak()
y = {call}
print((peak() - before) / x.nbytes)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
@pytest.mark.parametrize(
    ("call", "outputs"),
    [("gn.group_norm({}, 8)", 1), ("gn.group_norm({0}, 8, out={0})", 0), ("gn.group_norm_vjp({0}, {0}, 8)", 1),
     ("gn.moments({}, 8)", 0)],
)  # fmt: skip
def test_peak_memory_is_inputs_and_outputs(call: str, outputs: int) -> None:
    """67 MB of x: nothing of its size is made beside the outputs. The peak is the process's own, mappings included."""
    grown = float(python(RSS.format(warm=call.format("small"), call=call.format("x"))))
    assert grown < outputs + 0.1, f"{grown:.2f} times x"


def test_a_known_small_call_allocates_little() -> None:
    x, w = draw((2, 32, 8, 8)), np.ones(32, np.float32)
    gn.group_norm(x, 8, w, w)
    start = time.perf_counter()
    for _ in range(200):
        gn.group_norm(x, 8, w, w)
    assert time.perf_counter() - start < 2, "a known call makes its plan again"


# ---- nothing beyond an array is touched ------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by Linux's mprotect")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_memory_behind_an_array_is_not_read(layout: str, masked: bool) -> None:
    """Every array ends where a page begins that may not be touched; one sample, and the end of another, is all mask."""
    python(
        "import ctypes, mmap, numpy as np, groupnorm as gn\n"
        "PAGE, kept = mmap.PAGESIZE, []\n"
        "libc = ctypes.CDLL(None)\n"
        "def fenced(a):\n"
        "    size = -(-a.nbytes // PAGE) * PAGE\n"
        "    room = mmap.mmap(-1, size + PAGE); kept.append(room)\n"
        "    start = ctypes.addressof(ctypes.c_char.from_buffer(room))\n"
        "    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(PAGE), 0) == 0\n"
        "    b = np.frombuffer(room, a.dtype, a.size, size - a.nbytes).reshape(a.shape); b[...] = a; return b\n"
        "rng = np.random.default_rng(0)\n"
        "for dtype in ('f4', 'f8', 'f2'):\n"
        "    for shape in ((3, 12, 7, 5), (3, 81, 40, 41), (3, 6, 1, 1)):\n"
        "        n, c, h, w = shape\n"
        f"        layout, masked = {layout!r}, {masked}\n"
        "        full = shape if layout == 'NCHW' else (n, h, w, c)\n"
        "        draw = lambda s: fenced(rng.standard_normal(s).astype(dtype))\n"
        "        x, dy, y, weight, bias = draw(full), draw(full), draw(full), draw((c,)), draw((c,))\n"
        "        mask = None\n"
        "        if masked:\n"
        "            mask = np.ones((n, h, w), bool); mask[1, h // 2:] = False; mask[2] = False; mask = fenced(mask)\n"
        "        for threads in (1, 3):\n"
        "            gn.set_num_threads(threads)\n"
        "            gn.group_norm(x, 3, weight, bias, layout=layout, mask=mask, out=y)\n"
        "            gn.group_norm_vjp(dy, x, 3, weight, bias, layout=layout, mask=mask)\n"
        "            assert np.isfinite(y).all()\n"
    )


def test_a_signal_handler_or_finalizer_in_the_middle(monkeypatch: Any) -> None:
    """It finds its own thread at work on the blocks: it does without them, and does not wait for itself."""
    found: list[Any] = []

    def interrupted() -> None:
        gn.empty_cache()
        found.append(buffers.lend(1 << 20))

    monkeypatch.setattr(buffers, "_take_in", interrupted)
    buffers.lend(1 << 20)
    assert found == [None]
