"""Files that cannot be read or written as asked: one clear line, nothing half-written, nothing touched."""

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import groupnorm as gn
from array_files import load, random, save
from groupnorm.files import group_norm_file
from groupnorm.files.stream import LEAST_MEMORY

LARGE = (2, 6, 67, 71)  # 3 groups, each more than LEAST_MEMORY allows in a box


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
    "empty_astronomic.npy": (npy_header(GOOD.replace("50", "0, " + "9" * 40)), "no memory holds"),
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
    x = random(LARGE)
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


def test_other_arrays_of_an_archive_are_not_lost(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "a.npz", weight=X, y=X)
    safetensors.numpy.save_file({"weight": X}, tmp_path / "a.safetensors")
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    refused(gn.FileError, "holds other arrays, which would be lost: weight", tmp_path, x, f"{tmp_path}/a.npz:y", 2)
    refused(gn.FileError, "would be lost: weight", tmp_path, x, f"{tmp_path}/a.safetensors:y", 2)
    refused(gn.FileError, "would be lost: weight, y", tmp_path, x, y, 2, stats=tmp_path / "a.npz")
    group_norm_file(x, f"{tmp_path}/b.npz:y", 2, stats=tmp_path / "s.npz")
    group_norm_file(x, f"{tmp_path}/b.npz:y", 2, stats=tmp_path / "s.npz")  # the same once more
    with np.load(tmp_path / "s.npz") as stats:
        assert set(stats) == {"mean", "rstd"}
    np.savez(tmp_path / "g.npz", mean=X, dweight=X)  # gradients, which a forward does not make
    refused(gn.FileError, "would be lost: dweight", tmp_path, x, y, 2, stats=tmp_path / "g.npz")


@pytest.mark.parametrize("text", ["90", "[{}]", '"abc"', "[1, 2]", "null", "[" * 100_000])
def test_an_output_that_holds_something_else_is_replaced(tmp_path, text):
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "y.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode())
    group_norm_file(tmp_path / "x.npy", tmp_path / "y.safetensors", 2)
    assert set(safetensors.numpy.load_file(tmp_path / "y.safetensors")) == {"y"}


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
    path = save(tmp_path / "x.npy", random(LARGE))
    for change in (lambda: os.truncate(path, 10_000), lambda: os.utime(path, ns=(1, 1))):
        save(path, random(LARGE))
        with pytest.raises(gn.FileError, match=r"ended .* early|was changed"):
            group_norm_file(
                path, tmp_path / "y.npy", 3, max_memory=LEAST_MEMORY, progress=lambda *_, change=change: change()
            )
        assert os.listdir(tmp_path) == ["x.npy"]
