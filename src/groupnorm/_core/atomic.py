"""A file that appears whole or not at all.

It is written under a temporary name in the folder of its target, brought to the disk, and only then renamed, which the
system does in one step: whoever looks sees the old file, or none, or the new one. A process that is killed leaves at
most the temporary file behind; the next run for the same target removes it. A lock, which dies with its process, tells
a file that was left behind from one that is being written.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from groupnorm.errors import FileError

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays until someone removes it
    fcntl = None  # type: ignore[assignment]

__all__ = ["SUFFIX", "PendingFile", "commit", "pending_file", "write_whole"]

SUFFIX = ".groupnorm-partial"  # temporary names are .TARGET.RANDOM + SUFFIX


class PendingFile:
    """A file on its way to `target`: write to `file`, then `commit`; `discard` in any case.

    A link is followed: its target is what will be replaced. Raises FileError where the folder is not there or not
    writable, or where something that is no file has the name.
    """

    def __init__(self, target: str | os.PathLike[str]):
        self.what = os.fspath(target)
        self.target = Path(os.path.realpath(target))
        folder = self.target.parent
        if not folder.is_dir():
            raise FileError(f"{self.what}: there is no folder {folder}; make it first, or write elsewhere")
        mode = None
        with self.writing(), contextlib.suppress(FileNotFoundError):
            mode = os.stat(self.target).st_mode
        if mode is not None and not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise FileError(f"{self.what}: is {kind}, expected the name of a file to write; choose another name")
        with self.writing():
            self._remove_left_behind()
            self.temporary, descriptor = self._create()
            self.file = os.fdopen(descriptor, "wb")
            if mode is not None and hasattr(os, "fchmod"):
                with contextlib.suppress(OSError):  # file systems without permissions
                    os.fchmod(descriptor, stat.S_IMODE(mode))  # who may read the old file may read the new one

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What the system raises when it cannot write, as FileError."""
        try:
            yield
        except OSError as error:
            raise FileError(f"{self.what}: cannot be written ({error.strerror or error}); nothing was changed; "
                            "free some space, check the permissions, or write elsewhere") from error  # fmt: skip

    def finish(self) -> None:
        """Bring everything to the disk, still under the temporary name."""
        with self.writing():
            self.file.flush()
            os.fsync(self.file.fileno())

    def replace(self) -> None:
        """Take the target's name, in one step."""
        try:
            os.replace(self.temporary, self.target)
        except OSError as error:  # FileNotFoundError too: someone removed the temporary file
            raise FileError(
                f"{self.what}: cannot be renamed from {self.temporary.name} ({error.strerror}); run again"
            ) from error

    def discard(self) -> None:
        """Close, and remove the temporary file if it is still there. Never raises: it runs while an error is on its
        way.
        """
        with contextlib.suppress(OSError):
            self.file.close()  # tries to write what is left, which fails again on a full disk
        with contextlib.suppress(OSError):
            os.unlink(self.temporary)

    def _create(self) -> tuple[Path, int]:
        while True:
            name = self.target.with_name(f".{self.target.name}.{secrets.token_hex(4)}{SUFFIX}")
            try:
                descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
            except FileExistsError:
                continue
            if fcntl is None:
                return name, descriptor
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(
                FileNotFoundError
            ):  # another run may have taken it for left behind before the lock
                if os.stat(name).st_ino == os.fstat(descriptor).st_ino:
                    return name, descriptor
            os.close(descriptor)

    def _remove_left_behind(self) -> None:
        if fcntl is None:
            return
        for name in os.listdir(self.target.parent):
            if name.startswith(f".{self.target.name}.") and name.endswith(SUFFIX):
                path = self.target.with_name(name)
                with (
                    contextlib.suppress(OSError),
                    open(path, "rb") as file,
                ):  # it may be gone, or locked by who writes it
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)


def commit(files: Sequence[PendingFile]) -> None:
    """Give every file its name. All are on the disk before the first is renamed, so a full disk leaves none of them."""
    for file in files:
        file.finish()
    for file in files:
        file.replace()
    for folder in {file.target.parent for file in files}:
        with contextlib.suppress(
            OSError
        ):  # some systems cannot open a folder; the names then last as long as they see fit
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def pending_file(target: str | os.PathLike[str]) -> Iterator[PendingFile]:
    """A PendingFile that leaves no trace unless the block commits it."""
    pending = PendingFile(target)
    try:
        yield pending
    finally:
        pending.discard()


def write_whole(target: str | os.PathLike[str], data: bytes) -> None:
    """Write a small file in one go. Raises FileError as `PendingFile` does; then nothing is left behind."""
    with pending_file(target) as pending:
        with pending.writing():
            pending.file.write(data)
        commit([pending])
