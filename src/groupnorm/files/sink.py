"""An array on its way to a .npy, .npz or .safetensors file, written from its first byte to its last."""

import contextlib
import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from groupnorm._core.atomic import PendingFile
from groupnorm.errors import FileError
from groupnorm.files import npy
from groupnorm.files.npy import Form
from groupnorm.files.source import locate

__all__ = ["Sink", "refuse_loss", "write_arrays"]

_SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_LONGEST_HEADER = 100 << 20  # bytes, of a .safetensors file
_SPARE = 1 << 12  # bytes beside the data: headers and the archive's table
_SYNC = 1 << 28  # bytes between two requests to bring to the disk what was written


class Sink:
    """A file for one array of `form`: `write` its elements in order, then `finish`; `pending` is then ready to be
    committed.

    `location` is "Y.npy", "Y.npz:name" or "Y.safetensors:name"; `member` names the array where the location does not.
    The file has the form's type, little-endian, and order. FileError where it cannot be written, or has no room on the
    disk.
    """

    def __init__(self, location: str | os.PathLike[str], form: Form, member: str):
        path, named = locate(location)
        self._format, self._missing, self._unsynced = path.suffix.lower(), form.nbytes, 0
        self._archive: Any = None
        name = named or member
        refuse_loss(path, {name})
        if self._format == ".safetensors" and form.fortran:
            raise FileError(f"{path}: .safetensors holds arrays in C order only, got one in Fortran order; write .npy "
                            "or .npz, or save x in C order, e.g. with numpy.ascontiguousarray")  # fmt: skip
        self.pending = PendingFile(path)
        try:
            with self.pending.writing():
                free, needed = shutil.disk_usage(self.pending.target.parent).free, form.nbytes + _SPARE
            if free < needed:
                raise FileError(
                    f"{path}: needs {needed} bytes, got {free} free on its disk; free some, or write elsewhere"
                )
            with self.pending.writing():
                self._file: Any = self.pending.file
                if self._format == ".npz":
                    self._archive = zipfile.ZipFile(self.pending.file, "w")
                    self._file = self._archive.open(
                        zipfile.ZipInfo(f"{name.removesuffix('.npy')}.npy"), "w", force_zip64=True
                    )
                head = _safetensors_header(form, name) if self._format == ".safetensors" else npy.header(form)
                self._file.write(head)
        except BaseException:
            self.discard()
            raise

    def write(self, elements: Any) -> None:
        """Append a contiguous array."""
        view = memoryview(elements.view(np.uint8))
        with self.pending.writing():
            self._file.write(view)
            self._missing -= len(view)
            self._unsynced += len(view)
            if self._unsynced >= _SYNC:  # else the last fsync has everything to do, and nothing to overlap with
                self._unsynced = 0
                self.pending.file.flush()
                getattr(os, "fdatasync", os.fsync)(self.pending.file.fileno())

    def finish(self) -> None:
        """Complete the file; `commit` brings it to the disk."""
        if self._missing:
            raise FileError(
                f"{self.pending.what}: {self._missing} bytes of it were not computed; a mistake of groupnorm"
            )
        with self.pending.writing():
            if self._format == ".npz":
                self._file.close()
                self._archive.close()

    def discard(self) -> None:
        """Remove what was written, unless it was committed."""
        if self._archive is not None:
            self._archive.fp = io.BytesIO()  # takes what the archive insists on writing when it is closed
            with contextlib.suppress(Exception):
                self._file.close()
                self._archive.close()
        self.pending.discard()


def write_arrays(pending: PendingFile, format_: str, arrays: dict[str, Any]) -> None:
    """Write small arrays, by name, as .npz or .safetensors."""
    with pending.writing():
        if format_ == ".npz":
            stored = {
                k: a.view("V2") if a.dtype == ml_dtypes.bfloat16 else a for k, a in arrays.items()
            }  # as NumPy saves it
            np.savez(pending.file, **stored)
        else:
            pending.file.write(safetensors.numpy.save(arrays))


def refuse_loss(path: Path, names: Iterable[str]) -> None:
    """FileError if `path` is an archive that holds arrays of other names than these: a new file would take the place of
    all of them. What cannot be read as an archive holds none.
    """
    held: set[str] = set()
    with contextlib.suppress(OSError, ValueError, RecursionError, zipfile.BadZipFile, struct.error):
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                held = {name.removesuffix(".npy") for name in archive.namelist()}
        elif path.suffix.lower() == ".safetensors":
            with open(path, "rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                entries = json.loads(file.read(min(size, _LONGEST_HEADER)))
                held = set(entries) - {"__metadata__"} if isinstance(entries, dict) else set()
    lost = sorted(held - {name.removesuffix(".npy") for name in names})
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise FileError(
            f"{path}: holds other arrays, which would be lost: {', '.join(lost[:3])}{more}; write to another file"
        )


def _safetensors_header(form: Form, name: str) -> bytes:
    entry = {"dtype": _SAFETENSORS[form.dtype.name], "shape": list(form.shape), "data_offsets": [0, form.nbytes]}
    text = json.dumps({name: entry}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return struct.pack("<Q", len(text)) + text
