"""Group Normalization from file to file: every format, layout, type and road against the call in memory; bad files."""

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import groupnorm as gn
from groupnorm.files import group_norm_file
from groupnorm.files.boxes import Grid, size
from groupnorm.files.stream import LEAST_MEMORY

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
FORMATS = ["x.npy", "x.npz", "deflated.npz", "x.safetensors"]
GROUPS, CHANNELS = 3, 6
SHAPES = {"NCHW": (2, CHANNELS, 67, 71), "NHWC": (2, 67, 71, CHANNELS)}
SAMPLE = CHANNELS * 67 * 71  # elements; a third of them are a group, more than LEAST_MEMORY allows in a box of any type
PLENTY = 1 << 30


def save(path, array, name="x"):
    """Write the array as the ending of `path` says, the way its users do: with NumPy and safetensors themselves."""
    path = Path(path)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        (np.savez_compressed if "deflated" in path.name else np.savez)(path, **{name: array})
    else:
        safetensors.numpy.save_file({name: array}, path)
    return path


def load(path, name=None):
    """Read an array as users do; bfloat16 comes back from NumPy's formats as two bytes without a meaning."""
    path = Path(path)
    if path.suffix == ".npy":
        array = np.load(path)
    else:
        arrays = dict(np.load(path)) if path.suffix == ".npz" else safetensors.numpy.load_file(path)
        assert name is not None or len(arrays) == 1
        array = arrays[name] if name else next(iter(arrays.values()))
    return array.view(ml_dtypes.bfloat16) if array.dtype.kind == "V" else array


def random(shape, dtype="float32", seed=0, mean=3.0):
    return (np.random.default_rng(seed).normal(size=shape) + mean).astype(DTYPES[dtype])


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
    assert error <= 2 * own_error
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


# ---- bad files -------------------------------------------------------------------------------------------------------


def npy_header(text, version=1):
    raw = text.encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(raw)) + raw


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=array.dtype == object)
    return file.getvalue()


def npz_bytes(array, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x.npy", npy_bytes(array))
    return file.getvalue()


def tensors_bytes(header, data=b""):
    raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(raw)) + raw + data


def flipped(raw, position):
    return raw[:position] + bytes([raw[position] ^ 0x55]) + raw[position + 1 :]


X = random((2, 4, 50))
SAFE = safetensors.numpy.save({"x": X})
GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4, 50)}"
BAD = {
    "empty.npy": (b"", "is empty"),
    "empty.npz": (b"", "is empty"),
    "empty.safetensors": (b"", "is empty"),
    "text.npy": (b"hello, world", "not a .npy array"),
    "text.npz": (b"hello, world", "not a zip file"),
    "text.safetensors": (b"hello, world", "not a .safetensors"),
    "short.npy": (npy_bytes(X)[:20], "ends inside its header"),
    "magic.npy": (npy_bytes(X)[:7], "not a .npy array"),
    "cut.npy": (npy_bytes(X)[:-1], "is cut off"),
    "long.npy": (npy_bytes(X) + b"?", "is corrupt"),
    "version.npy": (flipped(npy_bytes(X), 6), "version"),
    "huge_header.npy": (npy_header(" " * (1 << 20), 2), "header of 1048576 bytes"),
    "lying_header.npy": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "header of 4294967295 bytes"),
    "nested.npy": (npy_header("(" * 10000), "not a dictionary"),
    "no_dictionary.npy": (npy_header("[1, 2]"), "must hold descr"),
    "extra_key.npy": (npy_header(GOOD[:-1] + ", 'more': 1}"), "must hold descr"),
    "call.npy": (npy_header("__import__('os').getcwd()"), "not a dictionary"),
    "negative.npy": (npy_header(GOOD.replace("50", "-50")), "shape"),
    "bool.npy": (npy_header(GOOD.replace("50", "True")), "shape"),
    "rank.npy": (npy_header(GOOD.replace("50", ", ".join("1" * 40))), "shape"),
    "astronomic.npy": (npy_header(GOOD.replace("50", "9" * 40)), "is cut off"),
    "order.npy": (npy_header(GOOD.replace("False", "2")), "fortran_order"),
    "pickled.npy": (npy_bytes(np.array([[{}, []]], object)), "never loaded"),
    "pickled.npz": (npz_bytes(np.array([[{}, []]], object)), "never loaded"),
    "cut.npz": (npz_bytes(X)[:-30], "not a zip file"),
    "sum.npz": (flipped(npz_bytes(X), 400), "CRC"),
    "sum_deflated.npz": (flipped(npz_bytes(X, zipfile.ZIP_DEFLATED), 500), "cannot be read"),
    "local.npz": (flipped(npz_bytes(X), 0), "cannot be read"),
    "nothing.npz": (b"PK\x05\x06" + bytes(18), "holds no array"),
    "no_json.safetensors": (tensors_bytes(b"{{{{{{{{"), "header is not that"),
    "list.safetensors": (tensors_bytes([1, 2, 3]), "header is not that"),
    "nested.safetensors": (tensors_bytes(b"[" * 100000), "header is not that"),
    "huge_header.safetensors": (struct.pack("<Q", 1 << 60) + bytes(64), "header of 1152921504606846976 bytes"),
    "cut.safetensors": (SAFE[:-1], "is cut off"),
    "none.safetensors": (tensors_bytes({"__metadata__": {}}), "holds no array"),
    "offsets.safetensors": (
        tensors_bytes({"x": {"dtype": "F32", "shape": [2, 2], "data_offsets": [-4, 12]}}, bytes(16)), "data_offsets",
    ),
    "keys.safetensors": (tensors_bytes({"x": {"dtype": "F32"}}, bytes(16)), "header is not that"),
    "shape.safetensors": (
        tensors_bytes({"x": {"dtype": "F32", "shape": [2, "2"], "data_offsets": [0, 16]}}, bytes(16)), "shape",
    ),
}  # fmt: skip


def refused(error, match, folder, *args, **options):
    """The error of a run, after checks that its message is one line and that nothing in the folder was touched."""
    before = {path: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    with pytest.raises(error, match=match) as caught:
        group_norm_file(*args, **options)
    assert isinstance(caught.value, gn.GroupNormError)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()} == before
    return str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused(tmp_path, name):
    raw, match = BAD[name]
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "y.npy").write_bytes(b"old")
    refused(gn.FileError, match, tmp_path, tmp_path / name, tmp_path / "y.npy", 2)
    message = refused(gn.FileError, match, tmp_path, tmp_path / name, tmp_path / "new.npy", 2, max_memory=LEAST_MEMORY)
    assert name in message


def test_corrupt_member_is_seen_in_pieces_too(tmp_path):
    x = random(SHAPES["NCHW"])
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raw = npz_bytes(x, method)
        (tmp_path / "x.npz").write_bytes(flipped(raw, len(raw) // 2))
        refused(gn.FileError, "corrupt", tmp_path, tmp_path / "x.npz", tmp_path / "y.npy", 3, max_memory=LEAST_MEMORY)


def test_archive_that_unpacks_to_more_than_it_says(tmp_path):
    """A member of 64 MiB of zeros that declares 48 bytes of data: no more than those are ever unpacked."""
    header = npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 4, 3)}".ljust(117) + "\n")
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header + bytes(1 << 26))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 17
    refused(gn.FileError, "is corrupt", tmp_path, tmp_path / "x.npz", tmp_path / "y.npy", 2)
    raw = (tmp_path / "x.npz").read_bytes()
    declared = struct.pack("<I", len(header) + 48)
    sizes = struct.pack("<I", len(header) + (1 << 26))
    (tmp_path / "x.npz").write_bytes(raw.replace(sizes, declared))
    refused(gn.FileError, "corrupt", tmp_path, tmp_path / "x.npz", tmp_path / "y.npy", 2)


@pytest.mark.parametrize("kind", ["<i4", "<c8", "|b1", "<U4", "<f16"])
def test_type_that_is_none_of_ours(tmp_path, kind):
    np.save(tmp_path / "x.npy", np.zeros((2, 4), kind))
    refused(gn.DtypeError, "expected float16", tmp_path, tmp_path / "x.npy", tmp_path / "y.npy", 2)
    safetensors.numpy.save_file({"x": np.zeros((2, 4), "i4")}, tmp_path / "x.safetensors")
    refused(gn.DtypeError, "F32", tmp_path, tmp_path / "x.safetensors", tmp_path / "y.npy", 2)


def test_members_are_named(tmp_path):
    arrays = {"a": X, "b": X + 1}
    np.savez(tmp_path / "x.npz", **arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    for name in ("x.npz", "x.safetensors"):
        refused(gn.FileError, "several arrays among a, b", tmp_path, tmp_path / name, tmp_path / "y.npy", 2)
        refused(gn.FileError, "no array 'c' among a, b", tmp_path, f"{tmp_path / name}:c", tmp_path / "y.npy", 2)
        group_norm_file(f"{tmp_path / name}:b", tmp_path / f"y_{name}", 2)
        assert np.array_equal(load(tmp_path / f"y_{name}", "b"), gn.group_norm(X + 1, 2))


def test_wrong_arguments(tmp_path):
    x, y = save(tmp_path / "x.npy", X), tmp_path / "y.npy"
    w3, w4 = save(tmp_path / "w3.npy", np.ones(3, "f4")), save(tmp_path / "w4.npy", np.ones((4, 1), "f4"))
    dy = save(tmp_path / "dy.npy", X[:1])
    dy16 = save(tmp_path / "dy16.npy", X.astype("f2"))
    refused(gn.ShapeError, "must divide", tmp_path, x, y, 3)
    refused(gn.OptionError, "activation", tmp_path, x, y, 2, activation="swish")
    refused(gn.OptionError, "layout", tmp_path, x, y, 2, layout="CHWN")
    refused(gn.OptionError, "eps", tmp_path, x, y, 2, eps=float("nan"))
    refused(gn.OptionError, "max_memory", tmp_path, x, y, 2, max_memory=1000)
    refused(gn.OptionError, "max_memory", tmp_path, x, y, 2, max_memory=1e9)
    refused(gn.ShapeError, "weight must have the shape", tmp_path, x, y, 2, weight=w3)
    refused(gn.ShapeError, "bias must have the shape", tmp_path, x, y, 2, bias=w4)
    refused(gn.ShapeError, "dy must have x's shape", tmp_path, x, y, 2, backward=dy)
    refused(gn.DtypeError, "dy must have x's shape, type", tmp_path, x, y, 2, backward=dy16)
    refused(gn.ShapeError, "batch and a channel axis", tmp_path, save(tmp_path / "v.npy", np.ones(3, "f4")), y, 2)
    refused(gn.FileError, "no such file|No such file", tmp_path, tmp_path / "absent.npy", y, 2)
    refused(gn.FileError, "is a folder", tmp_path, save_folder(tmp_path / "folder.npy"), y, 2)
    refused(gn.FileError, "is a folder", tmp_path, x, tmp_path / "folder.npy", 2)
    refused(gn.FileError, "there is no folder", tmp_path, x, tmp_path / "absent" / "y.npy", 2)
    refused(gn.FileError, "expected one of .npy, .npz, .safetensors", tmp_path, x, tmp_path / "y.txt", 2)
    refused(gn.FileError, "expected one of .npy, .npz, .safetensors", tmp_path, tmp_path / "x", y, 2)
    refused(gn.FileError, "stats are several", tmp_path, x, y, 2, stats=tmp_path / "s.npy")
    refused(gn.FileError, "two files", tmp_path, x, tmp_path / "s.npz", 2, stats=tmp_path / "s.npz")
    os.mkfifo(tmp_path / "pipe.npy")
    refused(gn.FileError, "not a regular file", tmp_path, tmp_path / "pipe.npy", y, 2)
    refused(gn.FileError, "not a regular file", tmp_path, x, tmp_path / "pipe.npy", 2)


def save_folder(path):
    path.mkdir()
    return path


@pytest.mark.parametrize("how", ["itself", "symlink", "hardlink", "folder", "dots"])
@pytest.mark.parametrize("role", ["x", "weight", "backward"])
def test_output_that_is_an_input(tmp_path, how, role):
    x = save(tmp_path / "x.npy", X)
    weight = save(tmp_path / "w.npy", np.ones(4, "f4"))
    victim = {"x": x, "weight": weight, "backward": save(tmp_path / "dy.npy", X)}[role]
    alias = tmp_path / "alias.npy"
    if how == "symlink":
        alias.symlink_to(victim)
    elif how == "hardlink":
        os.link(victim, alias)
    elif how == "folder":
        (tmp_path / "other").symlink_to(tmp_path)
        alias = tmp_path / "other" / victim.name
    elif how == "dots":
        alias = f"{tmp_path}/../{tmp_path.name}/{victim.name}"
    else:
        alias = victim
    given = {role: victim} if role != "x" else {}
    refused(gn.FileError, "same file", tmp_path, x, alias, 2, **given)
    np.savez(tmp_path / "w.npz", w=np.ones(4, "f4"))
    refused(gn.FileError, "same file", tmp_path, x, tmp_path / "y.npy", 2,
            weight=tmp_path / "w.npz", stats=tmp_path / "w.npz")  # fmt: skip


def test_link_to_a_file_is_followed(tmp_path):
    save(tmp_path / "x.npy", X)
    (tmp_path / "real").mkdir()
    (tmp_path / "y.npy").symlink_to(tmp_path / "real" / "y.npy")
    group_norm_file(tmp_path / "x.npy", tmp_path / "y.npy", 2)
    assert (tmp_path / "y.npy").is_symlink()
    assert np.array_equal(np.load(tmp_path / "real" / "y.npy"), gn.group_norm(X, 2))


def test_input_that_changes_while_it_is_read(tmp_path):
    path = save(tmp_path / "x.npy", random(SHAPES["NCHW"]))
    for change in (lambda: os.truncate(path, 10_000), lambda: os.utime(path, ns=(1, 1))):
        save(path, random(SHAPES["NCHW"]))
        with pytest.raises(gn.FileError, match=r"ended .* early|was changed"):
            group_norm_file(
                path, tmp_path / "y.npy", GROUPS, max_memory=LEAST_MEMORY, progress=lambda *_, change=change: change()
            )
        assert os.listdir(tmp_path) == ["x.npy"]


# ---- memory ----------------------------------------------------------------------------------------------------------

_MEASURE = """
import sys
from groupnorm.files import group_norm_file
x, small, y, layout, memory, backward = sys.argv[1:]
def run(path):
    given = {"backward": path} if backward == "True" else {}
    return group_norm_file(path, y, 8, layout=layout, max_memory=int(memory), **given)
def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))
run(small)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak so far, of which compiling kernels is the most, is forgotten
before = kilobytes("VmRSS:")
report = run(x)
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
    small = save(tmp_path / "small.npy", random((2, 8, 8, 8)))
    arguments = [tmp_path / "x.npy", small, tmp_path / "y.npy", layout, memory, backward]
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
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

    x = save(tmp_path / "x.npy", X)
    weight = save(tmp_path / "w.safetensors", np.arange(4, dtype="f4"), "w")
    run(str(x), 2, str(tmp_path / "y.npy"), weight=f"{weight}:w", activation="relu", json=True, max_memory="1.5M")
    report = json.loads(capsys.readouterr().out)
    assert report["bytes_read"] == X.nbytes
    assert report["bound"] in {"disk", "memory"}
    assert {"disk_bandwidth_bytes_per_s", "memory_bandwidth_bytes_per_s"} <= set(report)
    assert np.array_equal(np.load(tmp_path / "y.npy"), gn.group_norm(X, 2, np.arange(4, dtype="f4"), activation="relu"))
    run(str(x), 2, str(tmp_path / "y.npy"), stats=str(tmp_path / "s.npz"))
    out, err = capsys.readouterr()
    assert "GB/s" in out
    assert err == ""
    with pytest.raises(gn.OptionError, match="max-memory"):
        run(str(x), 2, str(tmp_path / "y.npy"), max_memory="lots")
