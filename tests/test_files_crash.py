"""Output that appears whole or not at all: under kill -9 at every moment, on a full disk, and beside another run."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import groupnorm as gn
from groupnorm._core import atomic
from groupnorm.files import group_norm_file, source
from groupnorm.files.stream import LEAST_MEMORY

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills and limits processes as POSIX does")

X = np.random.default_rng(0).normal(size=(4, 8, 64, 64)).astype("f4")
Y, MEAN, _ = gn.group_norm(X, 4, return_stats=True)
OLD = b"what was there before"


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "x.npy", X)
    return tmp_path


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def is_whole(path):
    """Whether every element is there; in pieces of a group the last bit may differ from the call in memory."""
    return np.allclose(np.load(path), Y, rtol=1e-5, atol=1e-6)


def has_stats(path):
    return np.allclose(np.load(path)["mean"], MEAN, rtol=1e-5, atol=1e-6)


def python(code, *arguments):
    source_folder = Path(gn.__file__).resolve().parents[1]
    path = os.pathsep.join([str(source_folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

# Runs in many parts, and kills itself at the given moment: just before or after the n-th call of a function.
_KILLED = """
import os, signal, sys
from groupnorm._core import atomic
from groupnorm.files import group_norm_file, sink
folder, name, when, count = sys.argv[1:]
owner, name = (sink.Sink, "write") if name == "write" else (os, name)
original, left = getattr(owner, name), [int(count)]
def deadly(*arguments, **options):
    left[0] -= 1
    if left[0] == 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments, **options)
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, deadly)
group_norm_file(f"{folder}/x.npy", f"{folder}/y.npy", 4, stats=f"{folder}/s.npz", max_memory=1 << 16)
print("survived")
"""

MOMENTS = {  # the function, before or after, which call of it, and whether y and s are there then
    "first write": ("write", "before", 1, False, False),
    "amid the writes": ("write", "after", 20, False, False),
    "before y is on the disk": ("fsync", "before", 1, False, False),
    "before s is on the disk": ("fsync", "before", 2, False, False),
    "all on the disk": ("fsync", "after", 2, False, False),
    "before the first rename": ("replace", "before", 1, False, False),
    "between the renames": ("replace", "after", 1, True, False),
    "after the renames": ("replace", "after", 2, True, True),
}


@pytest.mark.parametrize(
    ("moment", "existed"), [*((moment, True) for moment in MOMENTS), ("amid the writes", False), ("first write", False)]
)
def test_killed_at(folder, moment, existed):
    function, when, count, y_is_new, s_is_new = MOMENTS[moment]
    if existed:
        (folder / "y.npy").write_bytes(OLD)
        (folder / "s.npz").write_bytes(OLD)
    process = python(_KILLED, folder, function, when, count)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, (out, err)
    for name, is_new in (("y.npy", y_is_new), ("s.npz", s_is_new)):
        if is_new:
            assert is_whole(folder / name) if name == "y.npy" else has_stats(folder / name)
        elif existed:
            assert (folder / name).read_bytes() == OLD
        else:
            assert not (folder / name).exists()
    assert np.array_equal(np.load(folder / "x.npy"), X)
    left = [name for name in names(folder) if name.endswith(atomic.SUFFIX)]
    assert len(left) == 2 - y_is_new - s_is_new
    # What the dead process left disturbs nothing, and is cleared away.
    group_norm_file(folder / "x.npy", folder / "y.npy", 4, stats=folder / "s.npz")
    assert is_whole(folder / "y.npy")
    assert has_stats(folder / "s.npz")
    assert names(folder) == ["s.npz", "x.npy", "y.npy"]


_FOREVER = """
import sys
from groupnorm.files import group_norm_file
print("ready", flush=True)
while True:
    group_norm_file(sys.argv[1] + "/x.npy", sys.argv[1] + "/y.npy", 4, max_memory=1 << 16)
"""


def test_killed_at_any_time(folder):
    moments = random.Random(0)
    for _ in range(8):
        (folder / "y.npy").unlink(missing_ok=True)
        process = python(_FOREVER, folder)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(moments.uniform(0.0, 0.6))  # from the first load of an engine to amid the later runs
        process.kill()
        process.communicate()
        assert not (folder / "y.npy").exists() or is_whole(folder / "y.npy")
    group_norm_file(folder / "x.npy", folder / "y.npy", 4)
    assert names(folder) == ["x.npy", "y.npy"]


def test_interrupted_by_the_keyboard(folder):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        group_norm_file(folder / "x.npy", folder / "y.npy", 4, max_memory=LEAST_MEMORY, progress=interrupt)
    assert names(folder) == ["x.npy"]


# ---- full disk -------------------------------------------------------------------------------------------------------


def test_too_little_space_is_seen_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 20, 1 << 20, 1000))
    with pytest.raises(gn.FileError, match=r"needs \d+ bytes, got 1000 free"):
        group_norm_file(folder / "x.npy", folder / "y.npy", 4)
    assert names(folder) == ["x.npy"]


@pytest.mark.parametrize("name", ["y.npy", "y.npz", "y.safetensors"])
@pytest.mark.parametrize("at", ["header", "data", "end"])
@pytest.mark.parametrize("existed", [False, True])
def test_disk_that_fills_up(folder, monkeypatch, name, at, existed):
    """ENOSPC from the file itself, at its first bytes, amid the data, or in the last fsync."""
    if existed:
        (folder / name).write_bytes(OLD)
    room = {"header": 100, "data": X.nbytes // 2, "end": 1 << 40}[at]

    class Full:
        def __init__(self, file):
            self.file, self.room = file, room

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def full_fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fdopen = os.fdopen
    monkeypatch.setattr(os, "fdopen", lambda *arguments: Full(fdopen(*arguments)))
    if at == "end":
        monkeypatch.setattr(os, "fsync", full_fsync)
    with pytest.raises(gn.FileError, match="No space left on device") as caught:
        group_norm_file(folder / "x.npy", folder / name, 4, stats=folder / "s.npz", max_memory=LEAST_MEMORY)
    assert "\n" not in str(caught.value)
    assert names(folder) == sorted(["x.npy", *([name] if existed else [])])
    if existed:
        assert (folder / name).read_bytes() == OLD


_LIMITED = """
import resource, sys
import groupnorm as gn
from groupnorm.files import group_norm_file

folder, name, limit = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    group_norm_file(f"{folder}/x.npy", f"{folder}/{name}", 4, max_memory=1 << 16)
except gn.FileError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["y.npy", "y.npz", "y.safetensors"])
def test_limit_of_the_system_on_a_file(folder, name):
    """A refusal that comes from the kernel, amid a write that the system does in part."""
    group_norm_file(folder / "x.npy", folder / "warm.npy", 4, max_memory=LEAST_MEMORY)  # kernels are on the disk then
    out, err = python(_LIMITED, folder, name, 300_001).communicate(timeout=60)
    assert "File too large" in out, err
    assert out.count("\n") == 1
    assert err == ""
    assert names(folder) == ["warm.npy", "x.npy"]


_FULL = """
import shutil, sys
import groupnorm as gn
from groupnorm.files import group_norm_file
shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # as if the space went to someone else
try:
    group_norm_file(sys.argv[1], sys.argv[2], 4, max_memory=1 << 16)
except gn.FileError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small disk as Linux does")
def test_disk_that_is_full(folder):
    disk = folder / "disk"
    disk.mkdir()
    inside = f'mount -t tmpfs -o size=256k tmpfs {disk} && "$@"; code=$?; ls -A {disk}; exit $code'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no mount for this user")
    environment = {**os.environ, "PYTHONPATH": str(Path(gn.__file__).resolve().parents[1])}
    run = subprocess.run(
        [*command, sys.executable, "-c", _FULL, folder / "x.npy", disk / "y.npy"], capture_output=True, text=True,
        check=True, timeout=60, env=environment,
    )  # fmt: skip
    message, *left = run.stdout.splitlines()
    assert "No space left on device" in message
    assert left == []
    assert run.stderr == ""


def test_no_room_to_unpack(folder, monkeypatch):
    np.savez_compressed(folder / "x.npz", x=X)

    def full(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(source.tempfile, "TemporaryFile", full)
    with pytest.raises(gn.FileError, match="cannot be unpacked"):
        group_norm_file(folder / "x.npz", folder / "y.npy", 4, max_memory=LEAST_MEMORY)
    assert names(folder) == ["x.npy", "x.npz"]


# ---- folders and neighbours ------------------------------------------------------------------------------------------


def test_folder_that_cannot_be_written(folder, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        with pytest.raises(gn.FileError, match="Permission denied"):
            group_norm_file(folder / "x.npy", folder / "y.npy", 4)
    if sys.platform == "linux":
        with pytest.raises(gn.FileError, match="cannot be written"):
            group_norm_file(folder / "x.npy", "/proc/y.npy", 4)
    if os.geteuid() != 0:  # who is root writes anywhere
        folder.chmod(0o500)
        try:
            with pytest.raises(gn.FileError, match="Permission denied"):
                group_norm_file(folder / "x.npy", folder / "y.npy", 4)
        finally:
            folder.chmod(0o700)
    assert names(folder) == ["x.npy"]


def test_rename_that_fails_leaves_the_old_file(folder, monkeypatch):
    (folder / "y.npy").write_bytes(OLD)

    def busy(*_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(gn.FileError, match="cannot be renamed"):
        group_norm_file(folder / "x.npy", folder / "y.npy", 4)
    assert (folder / "y.npy").read_bytes() == OLD
    assert names(folder) == ["x.npy", "y.npy"]


def test_permissions_of_the_old_file_stay(folder):
    (folder / "y.npy").write_bytes(OLD)
    (folder / "y.npy").chmod(0o640)
    group_norm_file(folder / "x.npy", folder / "y.npy", 4)
    assert (folder / "y.npy").stat().st_mode & 0o777 == 0o640


def test_a_file_that_is_being_written_is_not_cleared_away(folder):
    other = atomic.PendingFile(folder / "y.npy")
    group_norm_file(folder / "x.npy", folder / "y.npy", 4)
    assert other.temporary.exists()
    other.file.write(OLD)
    atomic.commit([other])
    other.discard()
    assert (folder / "y.npy").read_bytes() == OLD
    assert names(folder) == ["x.npy", "y.npy"]


def test_many_runs_for_one_target(folder):
    failures = []

    def work():
        try:
            for _ in range(5):
                group_norm_file(folder / "x.npy", folder / "y.npy", 4, max_memory=1 << 18)
        except Exception as error:  # whatever it is, the test shows it
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert is_whole(folder / "y.npy")
    assert names(folder) == ["x.npy", "y.npy"]


def test_nothing_is_renamed_before_all_is_on_the_disk(folder, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, original=original, **k: (calls.append(name), original(*a, **k))[1]
        )
    group_norm_file(folder / "x.npy", folder / "y.npy", 4, stats=folder / "s.npz")
    renames = [i for i, name in enumerate(calls) if name == "replace"]
    assert len(renames) == 2
    assert calls[: renames[0]].count("fsync") == 2
    assert calls[renames[1] :] == ["replace", "fsync"]  # the folder, so that the new names last
