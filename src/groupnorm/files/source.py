"""An array in a .npy, .npz or .safetensors file: its shape and type at once, its elements later, by ranges.

Everything a header promises is compared with the file before a single element is read. Files are read by position into
the caller's memory: a memory map would kill the process if the file shrank underneath.
"""

import contextlib
import json
import os
import re
import stat
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from groupnorm.errors import DtypeError, FileError, GroupNormError, ShapeError
from groupnorm.files import npy
from groupnorm.files.npy import Form

__all__ = ["Source", "locate", "read_array", "read_vector"]

PathLike = str | os.PathLike[str]

MAX_JSON = 1 << 24  # bytes of a .safetensors header; the largest models have a few megabytes
_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_FORMATS = (".npy", ".npz", ".safetensors")
_BLOCK = 1 << 20  # bytes at a time when a member is unpacked to disk


def locate(location: PathLike) -> tuple[Path, str | None]:
    """Path and member of "X.npz:name" or "X.safetensors:name"; the member is None where none is named.

    FileError for a name that does not end like one of the three formats.
    """
    text = os.fspath(location)
    match = re.fullmatch(r"(.*\.(?:npz|safetensors)):(.+)", text, re.IGNORECASE | re.DOTALL)
    path, member = (Path(match[1]), match[2]) if match else (Path(text), None)
    if path.suffix.lower() not in _FORMATS:
        raise FileError(f"{text}: name ends in {path.suffix or 'nothing'!r}, expected one of {', '.join(_FORMATS)}; "
                        "save the array in one of these formats")  # fmt: skip
    return path, member


class Source:
    """One array of a file. `form` says what it is; `read_into` reads it; `finish` tells whether what was read was
    sound.

    Use as a context manager. Raises FileError where the file is not there, not a file, or does not hold what it
    promises. Ranges may be read in any order, but a compressed member only forwards until it is unpacked with `spool`.
    """

    form: Form

    def __init__(self, location: PathLike):
        self.path, member = locate(location)
        self.what, self.member = str(self.path), member
        self._crc: int | None = None  # what a stored member must come to, if that is known
        self._crc_now, self._crc_at = 0, 0  # ... and what its first bytes came to so far
        self._stream: IO[bytes] | None = None  # a compressed member, while it is read from its archive
        self._position = 0  # of that stream, in bytes of data
        self._start = 0  # where the data begins in the file
        self._open = contextlib.ExitStack()
        try:
            self._raw, self._before = self._open_file()
            with self._reading():
                {".npy": self._npy, ".npz": self._npz, ".safetensors": self._safetensors}[self.path.suffix.lower()]()
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def compressed(self) -> bool:
        """Whether ranges can only be read forwards."""
        return self._stream is not None

    def read_into(self, offset: int, buffer: Any) -> None:
        """Fill `buffer`, contiguous, with the data from byte `offset` on; FileError if the file ends early or is
        corrupt.
        """
        view = memoryview(buffer).cast("B")
        with self._reading():
            if self._stream is not None:
                if offset != self._position:
                    raise FileError(
                        f"{self.what}: a compressed array was read out of order; this is a mistake of groupnorm"
                    )
                self._position += len(view)
                self._fill(self._stream, view)
            else:
                self._raw.seek(self._start + offset)
                self._fill(self._raw, view)
        if offset == self._crc_at and self._crc is not None:
            self._crc_now = zlib.crc32(view, self._crc_now)
            self._crc_at += len(view)

    def spool(self, folder: Path) -> None:
        """Unpack a compressed member to a nameless file in `folder`, so that it can be read more than once."""
        if self._stream is None:
            return
        try:
            unpacked = self._open.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))  # noqa: SIM115
            block = memoryview(bytearray(_BLOCK))
            for start in range(0, self.form.nbytes, _BLOCK):
                part = block[: min(_BLOCK, self.form.nbytes - start)]
                self.read_into(start, part)
                while part:
                    part = part[unpacked.write(part) :]
        except OSError as error:
            raise FileError(f"{self.what}: cannot be unpacked into {folder} ({error.strerror}); free "
                            f"{self.form.nbytes} bytes there, or raise max_memory") from error  # fmt: skip
        self.finish()
        self._raw, self._start, self._stream = unpacked, 0, None

    def finish(self) -> None:
        """FileError if the check sum of what was read is wrong, or the file was changed meanwhile."""
        with self._reading():
            if self._stream is not None and self._stream.read(
                1
            ):  # the end is where the archive's check sum is compared
                raise FileError(f"{self.what}: holds more than its header promises; the file is corrupt, save it again")
        if self._crc is not None and self._crc_at == self.form.nbytes and self._crc_now != self._crc:
            raise FileError(f"{self.what}: check sum {self._crc_now:08x}, expected {self._crc:08x}; the file is "
                            "corrupt, save or copy it again")  # fmt: skip
        try:
            now = os.stat(self.path)
        except OSError:
            now = None
        if now is None or (now.st_size, now.st_mtime_ns, now.st_ino) != self._before:
            raise FileError(f"{self.what}: was changed while it was read; run again when nothing writes to it")

    # ---- the three formats -------------------------------------------------------------------------------------------

    def _open_file(self) -> tuple[Any, tuple[int, int, int]]:
        try:
            found = os.stat(self.path)
            if not stat.S_ISREG(found.st_mode):  # a pipe would block, a folder cannot be read
                kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
                raise FileError(f"{self.what}: is {kind}, expected a file; name the file that holds the array")
            raw: Any = self._open.enter_context(open(self.path, "rb", buffering=0))  # noqa: SIM115 - the stack does
        except OSError as error:
            raise FileError(
                f"{self.what}: cannot be read ({error.strerror}); check the path and its permissions"
            ) from error
        except ValueError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{self.what!r}: is not a path ({error}); check it") from error
        self._size = found.st_size
        if self._size == 0:
            raise FileError(f"{self.what}: is empty, expected an array; save it again")
        return raw, (found.st_size, found.st_mtime_ns, found.st_ino)

    def _npy(self) -> None:
        self.form, self._start, _ = npy.parse(self._raw.read, self.what)
        self._expect(self._size - self._start)

    def _npz(self) -> None:
        archive = self._open.enter_context(zipfile.ZipFile(self.path))
        names = [name[:-4] for name in archive.namelist() if name.endswith(".npy")]
        self.member = self._choose(names, self.member and self.member.removesuffix(".npy"))
        self.what = f"{self.path}:{self.member}"
        info = archive.getinfo(f"{self.member}.npy")
        if info.flag_bits & 1:
            raise FileError(f"{self.what}: is encrypted, expected a plain archive; save it with numpy.savez")
        stream = self._open.enter_context(archive.open(info))
        self.form, header_size, header = npy.parse(stream.read, self.what)
        self._expect(info.file_size - header_size)
        if info.compress_type != zipfile.ZIP_STORED:
            self._stream = stream
            return
        self._raw.seek(info.header_offset)
        local = self._raw.read(30)
        begin = info.header_offset + 30 + sum(struct.unpack_from("<HH", local, 26))  # past the name and the extra field
        if info.compress_size != info.file_size or begin + info.file_size > self._size:
            raise FileError(
                f"{self.what}: the archive's sizes contradict each other; the file is corrupt, save it again"
            )
        self._start = begin + header_size
        self._crc, self._crc_now = info.CRC, zlib.crc32(header)

    def _safetensors(self) -> None:
        head = self._raw.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if length > MAX_JSON or not 2 <= length <= self._size - 8:
            raise FileError(f"{self.what}: header of {length} bytes in a file of {self._size}, expected 2 to "
                            f"{MAX_JSON}; not a .safetensors file, or cut off; save it again")  # fmt: skip
        text = bytearray(length)
        self._fill(self._raw, memoryview(text))
        try:
            entries = json.loads(text.decode())
            entries.pop("__metadata__", None)
            self.member = self._choose(list(entries), self.member)
            self.what = f"{self.path}:{self.member}"
            entry = entries[self.member]
            name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(
                f"{self.what}: header is not that of .safetensors; the file is corrupt, save it again"
            ) from error
        if name not in _SAFETENSORS:
            raise DtypeError(f"{self.what}: holds elements of type {str(name)[:60]}, expected "
                             f"{', '.join(_SAFETENSORS)}; convert it, e.g. to float32")  # fmt: skip
        self.form = Form(
            npy.check_shape(shape, list, self.what), npy.float_type(_SAFETENSORS[name]), swapped=sys.byteorder == "big"
        )
        if type(begin) is not int or type(end) is not int or begin < 0:
            raise FileError(
                f"{self.what}: data_offsets {begin!r}, {end!r} are no positions; the file is corrupt, save it again"
            )
        self._start = 8 + length + begin
        self._expect(min(end, self._size - 8 - length) - begin)

    def _choose(self, names: list[str], wanted: str | None) -> str:
        """The name of the member to read; without a wish, the only one."""
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted in names:
            return str(wanted)
        if not names:
            raise FileError(f"{self.what}: holds no array; save one in it")
        got = f"no array {wanted!r}" if wanted else "several arrays"
        raise FileError(f"{self.what}: {got} among {listed}; name one of them, e.g. {self.path}:{names[0]}")

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _expect(self, held: int) -> None:
        shape, dtype, _, _ = self.form
        if held != self.form.nbytes:
            trouble = "is cut off" if held < self.form.nbytes else "is corrupt"
            raise FileError(f"{self.what}: holds {held} bytes of data, expected {self.form.nbytes} for "
                            f"{dtype.name} {shape}; the file {trouble}, save or copy it again")  # fmt: skip

    def _fill(self, file: Any, view: memoryview) -> None:
        while view:
            got = file.readinto(view)
            if not got:
                raise FileError(f"{self.what}: ended {len(view)} bytes early while it was read; save or copy it again")
            view = view[got:]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """What the system and the archive may raise, as FileError."""
        try:
            yield
        except GroupNormError:  # which says what is wrong; some are RuntimeErrors, too
            raise
        except OSError as error:
            raise FileError(
                f"{self.what}: cannot be read ({error.strerror or error}); check the disk and try again"
            ) from error
        except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError,
                struct.error, UnicodeDecodeError) as error:  # fmt: skip
            raise FileError(
                f"{self.what}: cannot be read ({error}); the file is corrupt or cut off, save or copy it again"
            ) from error
        except ValueError as error:
            raise FileError(f"{self.what}: cannot be read ({error}); the file is corrupt, save it again") from error


def read_array(location: PathLike) -> Any:
    """The whole array at `location`, of any shape, in memory."""
    with Source(location) as source:
        return _whole(source)


def _whole(source: Source) -> Any:
    raw = np.empty(prod(source.form.shape), source.form.dtype)
    source.read_into(0, raw.view(np.uint8))
    source.finish()
    if source.form.swapped:
        raw.view(f"u{raw.itemsize}").byteswap(inplace=True)
    return raw.reshape(source.form.shape, order="F" if source.form.fortran else "C")


def read_vector(location: PathLike, length: int, role: str) -> Any:
    """The whole array of shape (length,) at `location`, e.g. a weight; ShapeError for any other shape, before it is
    read.
    """
    with Source(location) as source:
        if source.form.shape != (length,):
            raise ShapeError(f"{role} must have the shape (C,) = ({length},): got {source.form.shape} in {source.what}")
        return _whole(source)
