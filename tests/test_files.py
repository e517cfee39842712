"""Group Normalization from file to file: every format, layout, type and road against the call in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import groupnorm as gn
from array_files import DTYPES, load, random, save
from groupnorm.files import group_norm_file
from groupnorm.files.boxes import Grid, size
from groupnorm.files.stream import LEAST_MEMORY

GROUPS, CHANNELS = 3, 6
SHAPES = {"NCHW": (2, CHANNELS, 67, 71), "NHWC": (2, 67, 71, CHANNELS)}
FORMATS = ["x.npy", "x.npz", "deflated.npz", "x.safetensors"]
SAMPLE = CHANNELS * 67 * 71  # elements; a third of them are a group, more than LEAST_MEMORY allows in a box of any type
PLENTY = 1 << 30


def budget(road, itemsize, backward=False):
    """max_memory that forces the road upon an array of SHAPES."""
    return {"samples": PLENTY, "groups": (7 if backward else 4) * (SAMPLE // 2) * itemsize, "pieces": LEAST_MEMORY}[
        road
    ]


def assert_close(got, expected, dtype, factor=4.0):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    eps = float(ml_dtypes.finfo(DTYPES[dtype]).eps) * (8 if dtype == "float64" else 1)  # merged in float64 as well
    np.testing.assert_allclose(got.astype("f8"), expected.astype("f8"), rtol=factor * eps, atol=factor * eps)


def leftovers(folder):
    return [path.name for path in Path(folder).iterdir() if "partial" in path.name]


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layout", "road"),
    [("NCHW", "samples"), ("NCHW", "groups"), ("NCHW", "pieces"), ("NHWC", "samples"), ("NHWC", "pieces")],
)
@pytest.mark.parametrize("name", FORMATS)
def test_forward_is_the_call_in_memory(tmp_path, name, layout, road, dtype):
    x, weight, bias = random(SHAPES[layout], dtype), random(CHANNELS, "float32", 1), random(CHANNELS, "float64", 2)
    options = {"layout": layout, "activation": "silu", "eps": 1e-3}
    expected, mean, rstd = gn.group_norm(x, GROUPS, weight, bias, return_stats=True, **options)
    y = tmp_path / f"y{Path(name).suffix}"
    report = group_norm_file(
        save(tmp_path / name, x), y, GROUPS, weight=save(tmp_path / "w.npy", weight), stats=tmp_path / "s.npz",
        bias=save(tmp_path / "b.safetensors", bias), max_memory=budget(road, x.itemsize), **options,
    )  # fmt: skip
    assert report.road == road
    passes = 2 if road == "pieces" else 1
    assert (report.bytes_read, report.bytes_written) == (passes * x.nbytes, x.nbytes)
    got = load(y)
    if road == "samples":
        assert np.array_equal(got.view(f"u{x.itemsize}"), expected.view(f"u{x.itemsize}"))
    assert_close(got, expected, dtype)
    for found, wanted in ((load(tmp_path / "s.npz", "mean"), mean), (load(tmp_path / "s.npz", "rstd"), rstd)):
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layout", "road"),
    [("NCHW", "samples"), ("NCHW", "groups"), ("NCHW", "pieces"), ("NHWC", "samples"), ("NHWC", "pieces")],
)
@pytest.mark.parametrize(("x_name", "dy_name"), [("x.npy", "deflated.npz"), ("deflated.npz", "dy.safetensors")])
def test_backward_is_the_call_in_memory(tmp_path, x_name, dy_name, layout, road, dtype):
    x, dy = random(SHAPES[layout], dtype), random(SHAPES[layout], dtype, 5, mean=0.5)
    weight, bias = random(CHANNELS, "float32", 1), random(CHANNELS, "float64", 2)
    options = {"layout": layout, "activation": "silu"}
    expected = gn.reference.group_norm_backward(dy, x, GROUPS, weight, bias, **options)
    (tmp_path / "dy").mkdir()
    report = group_norm_file(
        save(tmp_path / x_name, x), tmp_path / "dx.npy", GROUPS, weight=save(tmp_path / "w.npz", weight),
        bias=save(tmp_path / "b.npy", bias), stats=tmp_path / "s.safetensors", **options,
        backward=save(tmp_path / "dy" / dy_name, dy), max_memory=budget(road, x.itemsize, backward=True),
    )  # fmt: skip
    assert report.road == road
    dx = load(tmp_path / "dx.npy")
    assert dx.dtype == x.dtype
    assert_close(dx.astype("f8"), expected[0], dtype, factor=64)
    in_memory = gn.group_norm_backward(dy, x, GROUPS, weight, bias, **options)[0]
    error, own_error = (np.linalg.norm(a.astype("f8") - expected[0]) for a in (dx, in_memory))
    assert error <= 4 * own_error  # in memory the mean's rounding is made up for, in pieces it is not
    found = safetensors.numpy.load_file(tmp_path / "s.safetensors")
    assert set(found) == {"mean", "rstd", "dweight", "dbias"}
    assert (found["dweight"].dtype, found["dbias"].dtype) == (np.float32, np.float64)
    for name, wanted in (("dweight", expected[1]), ("dbias", expected[2])):
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("memory", [LEAST_MEMORY, 8 * LEAST_MEMORY, PLENTY])
def test_fortran_order_and_foreign_bytes(tmp_path, layout, backward, memory):
    x, dy = (np.asfortranarray(random(SHAPES[layout], seed=seed)) for seed in (0, 1))
    np.save(tmp_path / "x.npy", x.astype(">f4", order="F"))
    np.save(tmp_path / "dy.npy", dy)
    given = {"backward": tmp_path / "dy.npy"} if backward else {}
    group_norm_file(tmp_path / "x.npy", tmp_path / "y.npz:out", GROUPS, layout=layout, max_memory=memory, **given)
    y = np.load(tmp_path / "y.npz")["out"]
    assert y.flags.f_contiguous
    if backward:
        expected = gn.group_norm_backward(dy, x, GROUPS, layout=layout)[0]
    else:
        expected = gn.group_norm(x, GROUPS, layout=layout)
    assert_close(y, expected, "float32", factor=16)
    with pytest.raises(gn.FileError, match="C order"):
        group_norm_file(tmp_path / "x.npy", tmp_path / "y.safetensors", GROUPS, layout=layout)


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0), (5, 4), (1, 4, 1, 1), (2, 4, 3, 4, 5)])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_any_rank_and_npy_version(tmp_path, shape, version):
    x = random(shape)
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, x, version=version)
    group_norm_file(tmp_path / "x.npy", tmp_path / "y.npy", 2, stats=tmp_path / "s.npz")
    expected, mean, _ = gn.group_norm(x, 2, return_stats=True)
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)
    assert np.array_equal(np.load(tmp_path / "s.npz")["mean"], mean)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("memory", [LEAST_MEMORY, 6 * LEAST_MEMORY])
def test_uneven_groups(tmp_path, layout, memory, backward):
    shape = (2, 11, 40, 41) if layout == "NCHW" else (2, 40, 41, 11)
    x, dy = random(shape), random(shape, seed=1)
    save(tmp_path / "x.npy", x)
    given = {"backward": save(tmp_path / "dy.npy", dy)} if backward else {}
    group_norm_file(tmp_path / "x.npy", tmp_path / "y.npy", 4, layout=layout, uneven=True, max_memory=memory, **given)
    if backward:
        expected = gn.group_norm_backward(dy, x, 4, layout=layout, uneven=True)[0]
    else:
        expected = gn.group_norm(x, 4, layout=layout, uneven=True)
    assert_close(np.load(tmp_path / "y.npy"), expected, "float32", factor=16)


@pytest.mark.parametrize("backward", [False, True])
def test_infinity_stays_in_its_group(tmp_path, backward):
    x = random(SHAPES["NHWC"])
    x[0, 0, 0, 0] = np.inf
    save(tmp_path / "x.npy", x)
    given = {"backward": tmp_path / "x.npy"} if backward else {}
    group_norm_file(tmp_path / "x.npy", tmp_path / "y.npy", GROUPS, layout="NHWC", max_memory=LEAST_MEMORY, **given)
    y = np.load(tmp_path / "y.npy")
    assert np.isnan(y[0, ..., :2]).any()
    assert np.isfinite(y[0, ..., 2:]).all()
    assert np.isfinite(y[1]).all()


def test_progress_and_report(tmp_path):
    seen = []
    for backward in (False, True):
        for memory in (LEAST_MEMORY, PLENTY):
            x = save(tmp_path / "x.npy", random(SHAPES["NCHW"]))
            report = group_norm_file(
                x, tmp_path / "y.npy", GROUPS, max_memory=memory, backward=x if backward else None,
                progress=lambda done, total: seen.append((done, total)),
            )  # fmt: skip
            assert seen[-1] == (report.bytes_read, report.bytes_read)
            assert report.bound in {"disk", "memory"}
            assert min(report.disk_bandwidth_bytes_per_s, report.memory_bandwidth_bytes_per_s) > 0
            assert "the bound was the " in str(report)
    assert [done for done, _ in seen][:5] == sorted(done for done, _ in seen[:5])


# ---- how it is cut ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 7, 5, 4), (1, 7, 1, 4), (2, 7)])
@pytest.mark.parametrize("channel", ["first", "last"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("most", [1, 2, 3, 10, 33, 1000])
def test_boxes_tile_the_file_in_order(shape, channel, order, most):
    shape = shape if channel == "first" else (shape[0], *shape[2:], shape[1])
    axis = 1 if channel == "first" else len(shape) - 1
    edges = (0, 2, 4, 7)
    grid = (
        Grid(shape, 0, axis, edges) if order == "C" else Grid(shape[::-1], len(shape) - 1, len(shape) - 1 - axis, edges)
    )
    reached = 0
    for unit in grid.units(most, 2 * most):
        start = reached
        for i, (begin, end) in enumerate(unit.box):
            assert i in (grid.batch, grid.channel) or (begin, end) == (0, grid.shape[i])
        assert set(unit.box[grid.channel]) <= set(edges)
        assert unit.whole == (size(unit.box) <= 2 * most)
        assert grid.offset(unit.box) == start
        for piece in grid.pieces(unit.box, most):
            assert size(piece) <= most
            assert grid.offset(piece) == reached
            first, last = grid.groups(piece)
            inside_one, whole_groups = last - first == 1, set(piece[grid.channel]) <= set(edges)
            assert inside_one or whole_groups
            reached += size(piece)
        assert reached == start + size(unit.box)
    assert reached == np.prod(shape)


# ---- memory ----------------------------------------------------------------------------------------------------------

_MEASURE = """
import ctypes, sys
import groupnorm as gn
from groupnorm.files import group_norm_file
x, small, y, layout, memory, backward = sys.argv[1:]
def run(path):
    given = {"backward": path} if backward == "True" else {}
    return group_norm_file(path, y, 8, layout=layout, max_memory=int(memory), **given)
def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
warm = run(small)
gn.empty_cache()
getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what the first run freed goes back to the system
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak so far, of which compiling kernels is the most, is forgotten
before = kilobytes("VmRSS:")
report = run(x)
assert warm.road == report.road
print(report.road, (kilobytes("VmHWM:") - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux only")
@pytest.mark.parametrize(
    ("shape", "layout", "road", "backward"),
    [
        ((24, 32, 160, 160), "NCHW", "samples", False),
        ((1, 32, 6, 102400), "NCHW", "pieces", False),
        ((1, 6, 102400, 32), "NHWC", "pieces", False),
        ((24, 32, 160, 160), "NCHW", "groups", True),
        ((1, 6, 102400, 32), "NHWC", "pieces", True),
    ],
)
def test_memory_is_bounded(tmp_path, shape, layout, road, backward):
    """A file of 79 MB within 16 MiB: what the process grows by stays far below the file's size."""
    memory = 1 << 24
    big = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "f4", shape)
    big.reshape(-1)[:] = np.tile(np.arange(3200, dtype="f4"), big.size // 3200)
    big.flush()
    # A smaller file that takes the same road, so that its kernels are loaded when measuring begins.
    small = save(
        tmp_path / "small.npy", big[:2] if shape[0] > 1 else big[:, :, :51200] if layout == "NHWC" else big[..., :51200]
    )
    arguments = [tmp_path / "x.npy", small, tmp_path / "y.npy", layout, memory, backward]
    command = [sys.executable, "-c", _MEASURE, *map(str, arguments)]
    for _ in range(2):  # the first run may compile kernels, which takes more memory than any array here
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    found, grown = run.stdout.split()
    print(f"{found}: {int(grown) / 1e6:.1f} MB for a file of {big.nbytes / 1e6:.1f} MB within {memory / 1e6:.1f} MB")
    assert found == road
    assert int(grown) < memory + (8 << 20)


def environment():
    source = Path(__file__).resolve().parents[1] / "src"
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])}


# ---- the command -----------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    from groupnorm.cli.run import run

    array = random((2, 4, 50))
    x = save(tmp_path / "x.npy", array)
    weight = save(tmp_path / "w.safetensors", np.arange(4, dtype="f4"), "w")
    run(str(x), 2, str(tmp_path / "y.npy"), weight=f"{weight}:w", activation="relu", json=True, max_memory="1.5M")
    report = json.loads(capsys.readouterr().out)
    assert report["bytes_read"] == array.nbytes
    assert report["bound"] in {"disk", "memory"}
    assert {"disk_bandwidth_bytes_per_s", "memory_bandwidth_bytes_per_s"} <= set(report)
    expected = gn.group_norm(array, 2, np.arange(4, dtype="f4"), activation="relu")
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)
    run(str(x), 2, str(tmp_path / "y.npy"), stats=str(tmp_path / "s.npz"))
    out, err = capsys.readouterr()
    assert "GB/s" in out
    assert err == ""
    with pytest.raises(gn.OptionError, match="max-memory"):
        run(str(x), 2, str(tmp_path / "y.npy"), max_memory="lots")
