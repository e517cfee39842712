"""The header of a .npy file: read without trusting it, written as NumPy writes it; and the types that files may hold.

Source: the .npy format, versions 1.0 to 3.0, as described in `numpy.lib.format`.
"""

import ast
import io
import struct
import sys
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from groupnorm.errors import DtypeError, FileError

__all__ = ["MAX_RANK", "Form", "check_shape", "float_type", "header", "parse"]

MAX_HEADER = 1 << 14  # bytes; a header of ours needs about 128, and a text is parsed before anything else is known
MAX_RANK = 32
_MAGIC = b"\x93NUMPY"
_TYPES = {
    "f2": np.float16,
    "f4": np.float32,
    "f8": np.float64,
    "V2": ml_dtypes.bfloat16,
    "bfloat16": ml_dtypes.bfloat16,
}
_DESCRIPTIONS = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "<V2"}  # NumPy saves bfloat16 as V2


class Form(NamedTuple):
    """What a file says about its array: shape, type (in this machine's byte order), and how the elements lie."""

    shape: tuple[int, ...]
    dtype: Any
    fortran: bool = False  # the first axis changes fastest
    swapped: bool = False  # the bytes of an element are in the other order than this machine's

    @property
    def nbytes(self) -> int:
        """Bytes of the array's data."""
        return int(prod(self.shape) * self.dtype.itemsize)


def parse(read: Callable[[int], bytes], what: str) -> tuple[Form, int, bytes]:
    """The Form in a .npy header, the header's size, and its bytes. `read(n)` gives the next n bytes, fewer at the end.

    Raises FileError for what is no such header, is too long, or describes an array of Python objects; DtypeError for a
    type that is not one of ours. Nothing is unpickled.
    """
    raw = read(8)
    if not raw:
        raise FileError(f"{what}: is empty, expected a .npy array; save it again, e.g. with numpy.save")
    if len(raw) < 8 or raw[:6] != _MAGIC:
        raise FileError(
            f"{what}: starts with {raw[:6]!r}, expected {_MAGIC!r}: not a .npy array; save it with numpy.save"
        )
    version = (raw[6], raw[7])
    if version not in {(1, 0), (2, 0), (3, 0)}:
        raise FileError(
            f"{what}: .npy version {raw[6]}.{raw[7]}, expected 1.0, 2.0 or 3.0; save it again with numpy.save"
        )
    code, width = ("<H", 2) if version == (1, 0) else ("<I", 4)
    raw += _exactly(read, width, what)
    length = struct.unpack(code, raw[8:])[0]
    if length > MAX_HEADER:
        raise FileError(
            f"{what}: header of {length} bytes, expected at most {MAX_HEADER}; the file is corrupt, save it again"
        )
    text = _exactly(read, length, what)
    raw += text
    try:
        fields = ast.literal_eval(text.decode("utf-8" if version == (3, 0) else "latin1").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise FileError(
            f"{what}: header {text[:60]!r} is not a dictionary; the file is corrupt, save it again"
        ) from error
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise FileError(f"{what}: header {text[:60]!r} must hold descr, fortran_order and shape; the file is corrupt")
    if not isinstance(fields["fortran_order"], bool):
        raise FileError(
            f"{what}: fortran_order is {fields['fortran_order']!r}, expected True or False; the file is corrupt"
        )
    shape = check_shape(fields["shape"], tuple, what)
    dtype, swapped = _type(fields["descr"], what)
    return Form(shape, dtype, fields["fortran_order"], swapped), len(raw), raw


def check_shape(shape: Any, kind: type[list[Any]] | type[tuple[Any, ...]], what: str) -> tuple[int, ...]:
    """A shape from a header as a tuple; FileError unless it is a `kind` of at most MAX_RANK whole numbers."""
    lengths = tuple(shape) if type(shape) is kind else (-1,)
    if len(lengths) > MAX_RANK or not all(type(n) is int and n >= 0 for n in lengths):  # bool is no length
        raise FileError(
            f"{what}: shape {str(shape)[:60]}, expected up to {MAX_RANK} lengths; the file is corrupt, save it again"
        )
    if (
        0 in lengths and prod(max(n, 1) for n in lengths) >= 1 << 60
    ):  # no bytes are missing, but NumPy has no such array
        raise FileError(f"{what}: shape {str(shape)[:60]}, which no memory holds; the file is corrupt, save it again")
    return lengths


def header(form: Form) -> bytes:
    """The .npy header of an array of this form, little-endian."""
    fields = {"descr": _DESCRIPTIONS[form.dtype.name], "fortran_order": form.fortran, "shape": form.shape}
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, fields)
    return out.getvalue()


def float_type(name: str) -> Any:
    """The dtype called `name`, one of the package's four."""
    return np.dtype(_TYPES[_DESCRIPTIONS[name][1:]])


def _type(description: Any, what: str) -> tuple[Any, bool]:
    """dtype in this machine's byte order, and whether the file has the other one."""
    text = description if isinstance(description, str) else ""
    if text.lstrip("<>=|").startswith("O"):
        raise FileError(f"{what}: holds pickled Python objects, which are never loaded (they can run code); "
                        "save it as an array of floats")  # fmt: skip
    found = _TYPES.get(text.lstrip("<>=|"))
    if found is None:
        raise DtypeError(f"{what}: holds elements of type {str(description)[:60]!r}, expected float16, bfloat16, "
                         "float32 or float64; convert it, e.g. with x.astype(numpy.float32)")  # fmt: skip
    native = "<" if sys.byteorder == "little" else ">"
    return np.dtype(found), text[0] in "<>" and text[0] != native


def _exactly(read: Callable[[int], bytes], size: int, what: str) -> bytes:
    raw = read(size)
    if len(raw) != size:
        raise FileError(f"{what}: ends inside its header; the file is cut off, save or copy it again")
    return raw
