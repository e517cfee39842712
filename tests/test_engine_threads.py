"""The CPU engine among threads and processes: its pool, and its compiled kernels on disk."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import groupnorm as gn
from groupnorm._core.threads import usable_cpus
from programs import SOURCE, python

LARGE = (4, 32, 64, 64)  # 2 MB: threads share it
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def draw(shape: tuple[int, ...] = LARGE, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_many_python_threads() -> None:
    """Each gets its own results, forward and backward, whoever has the pool, while the number of threads changes."""
    before = gn.get_num_threads()
    x = [draw(LARGE if i % 2 else (2, 8, 9, 9), i) for i in range(8)]
    want = [(gn.group_norm(a, 4), gn.group_norm_vjp(a, a, 4).dx) for a in x]
    wrong: list[Any] = []

    def work(i: int) -> None:
        try:
            for turn in range(8):
                gn.set_num_threads(1 + (i + turn) % 4)
                same = np.array_equal(gn.group_norm(x[i], 4), want[i][0])
                if not (same and np.array_equal(gn.group_norm_vjp(x[i], x[i], 4).dx, want[i][1])):
                    wrong.append((i, turn))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    finally:
        gn.set_num_threads(before)
    assert not wrong


def test_first_calls_at_once() -> None:
    """Eight threads make the first calls of a process together: the pool and its kernels are made once."""
    python(
        "import threading, numpy as np, groupnorm as gn\n"
        "x = np.random.default_rng(0).standard_normal((4, 32, 64, 64)).astype('f4'); found = []\n"
        "barrier = threading.Barrier(8)\n"
        "def work():\n barrier.wait(); found.append(gn.group_norm(x, 8).tobytes())\n"
        "threads = [threading.Thread(target=work) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert len(found) == 8 and len(set(found)) == 1\n"
        "names = [t.name for t in threading.enumerate() if t.name.startswith('groupnorm-')]\n"
        "assert len(names) == len(set(names)) == 1, names\n"
    )


@pytest.mark.parametrize(("wish", "number"), [("1", 1), ("3", 3), (" 2 ", 2), ("64", 64)])
def test_environment_sets_the_number(wish: str, number: int) -> None:
    code = (
        "import groupnorm as gn, numpy as np\n"
        "print(gn.get_num_threads()); gn.group_norm(np.ones((8, 64, 64, 64), 'f4'), 8)"
    )
    assert int(python(code, GROUPNORM_NUM_THREADS=wish)) == number


@pytest.mark.parametrize("wish", ["0", "-1", "two", "", "1.5", "1,2"])
def test_environment_that_says_nothing_sensible(wish: str) -> None:
    code = (
        "import groupnorm as gn, numpy as np\n"
        "try: gn.group_norm(np.ones((2, 4), 'f4'), 2)\n"
        "except gn.OptionError as e: print(e)\n"
        "gn.set_num_threads(2); gn.group_norm(np.ones((2, 4), 'f4'), 2)\n"
    )
    message = python(code, GROUPNORM_NUM_THREADS=wish)
    assert "GROUPNORM_NUM_THREADS" in message
    assert repr(wish) in message


def test_without_the_environment_every_usable_cpu() -> None:
    code = "import groupnorm as gn; print(gn.get_num_threads())"
    assert int(python(code, GROUPNORM_NUM_THREADS=None)) == usable_cpus()
    if hasattr(os, "sched_getaffinity"):
        assert usable_cpus() <= len(os.sched_getaffinity(0))


def test_set_num_threads_is_obeyed_and_told() -> None:
    code = (
        "import groupnorm as gn, numpy as np, threading\n"
        "x = np.ones((8, 64, 64, 64), 'f4')\n"
        "count = lambda: sum(t.name.startswith('groupnorm-') for t in threading.enumerate())\n"
        "gn.set_num_threads(1); gn.group_norm(x, 8); assert count() == 0, count()\n"
        "gn.set_num_threads(np.int64(3)); gn.group_norm(x, 8); assert count() == 2, count()\n"
        "assert gn.get_num_threads() == 3 and type(gn.get_num_threads()) is int\n"
    )
    python(code)


# ---- processes -------------------------------------------------------------------------------------------------------

FORK = """
import numpy as np, groupnorm as gn, os, signal, threading
x = np.random.default_rng(0).standard_normal((4, 32, 64, 64)).astype('f4')
want = {before}
def child():
    signal.alarm(60)
    try:
        y = gn.group_norm(x, 8)
        assert want is None or np.array_equal(y, want)
        gn.group_norm_vjp(x, x, 8)
        os._exit(0)
    except BaseException as e:
        print(repr(e), flush=True)
        os._exit(1)
for _ in range(3):
    pid = os.fork()
    if pid == 0: child()
    assert os.waitpid(pid, 0)[1] == 0
    y = gn.group_norm(x, 8)
    want = y if want is None else want
    assert np.array_equal(y, want)
"""


@forks
@pytest.mark.parametrize("before", ["gn.group_norm(x, 8)", "None"], ids=["after the parent", "before the parent"])
def test_forked_child(before: str) -> None:
    python(FORK.format(before=before))


@forks
def test_fork_while_threads_are_inside_calls() -> None:
    """A child may inherit any lock in any state; it must not wait for a thread that it does not have."""
    python(
        "import numpy as np, groupnorm as gn, os, signal, threading\n"
        "x = np.random.default_rng(0).standard_normal((4, 32, 64, 64)).astype('f4'); want = gn.group_norm(x, 8)\n"
        "stop = threading.Event()\n"
        "def work():\n"
        "    while not stop.is_set(): gn.group_norm(x, 8)\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]; [t.start() for t in threads]\n"
        "for i in range(25):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        signal.alarm(20)\n"
        "        os._exit(0 if np.array_equal(gn.group_norm(x, 8), want) else 1)\n"
        "    status = os.waitpid(pid, 0)[1]\n"
        "    if status: break\n"
        "stop.set(); [t.join() for t in threads]\n"
        "assert status == 0, (i, status)\n"
    )


TORCH = (
    "import numpy as np, os, signal, threading\n"
    "import groupnorm as gn\n"
    "gn.set_num_threads(3)\n"
    "x = np.random.default_rng(0).standard_normal((4, 32, 64, 64)).astype('f4')\n"
    "want = gn.group_norm(x, 8).tobytes()\n"  # by our own workers: PyTorch is not there yet
    "import torch\n"
    "torch.set_num_threads(2)\n"
    "from groupnorm._engines.cpu.threads import POOL, _ENTERED, _PARALLEL\n"
    "slot = lambda: int(POOL._state[(-POOL._state.ctypes.data % 64) // 8 + _ENTERED])\n"
    "assert gn.group_norm(x, 8).tobytes() == want\n"
)


def test_team_of_torch() -> None:
    """Once PyTorch is loaded its OpenMP team does the jobs, with the same bits, from any thread; a team of one thread
    is no help, so then our own workers do.
    """
    pytest.importorskip("torch")
    python(
        TORCH + "if not POOL._header[_PARALLEL]: raise SystemExit(0)\n"  # a PyTorch with another runtime
        "assert slot() == 2, slot()\n"
        "wrong = []\n"
        "def work():\n"
        "    for _ in range(20):\n"
        "        torch.ones(1 << 20).add_(1)\n"
        "        if gn.group_norm(x, 8).tobytes() != want: wrong.append(1)\n"
        "threads = [threading.Thread(target=work) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; assert not wrong\n"
        "torch.set_num_threads(1); gn.group_norm(x, 8); before = slot()\n"
        "for _ in range(5): assert gn.group_norm(x, 8).tobytes() == want\n"
        "assert slot() == before\n"
    )


@forks
@pytest.mark.parametrize("parent", ["pass", "import groupnorm", "import groupnorm as gn; gn.group_norm(x, 8)"])
def test_fork_after_the_team_of_torch(parent: str) -> None:
    """A team that the parent used, for PyTorch's work or for ours, would hang in a forked child."""
    pytest.importorskip("torch")
    python(
        "import multiprocessing, numpy as np, signal, torch\n"
        "x = np.ones((4, 32, 64, 64), 'f4')\n"
        "torch.set_num_threads(2); torch.ones(1 << 22).add_(1)\n"
        f"{parent}\n"
        "def work():\n"
        "    import groupnorm as gn\n"
        "    signal.alarm(20); gn.set_num_threads(3); assert not gn.group_norm(x, 8).any()\n"
        "for _ in range(3):\n"
        "    child = multiprocessing.get_context('fork').Process(target=work)\n"
        "    child.start(); child.join(); assert child.exitcode == 0, child.exitcode\n"
    )


@forks
def test_fork_while_another_thread_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child compiles what it needs, whatever was half compiled when it was made."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    python(
        "import numpy as np, groupnorm as gn, os, signal, threading, time\n"
        "x = np.ones((4, 32, 64, 64), 'f4'); gn.group_norm(x, 8)\n"
        "t = threading.Thread(target=lambda: gn.group_norm(x, 8, activation='gelu')); t.start(); time.sleep(0.2)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(60)\n"
        "    gn.group_norm(x, 8, activation='tanh'); os._exit(0)\n"
        "status = os.waitpid(pid, 0)[1]; t.join()\n"
        "assert status == 0, 'the child waits for a thread of its parent'\n"
    )


@forks
def test_fork_while_another_thread_holds_the_lock_of_buffers() -> None:
    """The same, not left to chance: a lock that is held during the fork is held for ever in the child."""
    python(
        "import numpy as np, groupnorm as gn, os, signal, threading, importlib\n"
        "x = np.ones((4, 32, 64, 64), 'f4'); gn.group_norm(x, 8)\n"
        "lock = importlib.import_module('groupnorm._core.buffers')._lock\n"
        "held, done = threading.Event(), threading.Event()\n"
        "def hold():\n"
        "    with lock: held.set(); done.wait()\n"
        "t = threading.Thread(target=hold); t.start(); held.wait()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(8)\n"
        "    gn.group_norm(x, 8); gn.group_norm(x, 8, activation='relu'); gn.empty_cache(); os._exit(0)\n"
        "status = os.waitpid(pid, 0)[1]; done.set(); t.join()\n"
        "assert status == 0, 'the child waits for a thread of its parent'\n"
    )


def test_spawned_pool(tmp_path: Path) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(
        "import multiprocessing, numpy as np, groupnorm as gn\n"
        "def work(seed):\n"
        "    x = np.random.default_rng(seed).standard_normal((2, 32, 64, 64)).astype('f4')\n"
        "    return gn.group_norm(x, 8).tobytes()\n"
        "if __name__ == '__main__':\n"
        "    want = [work(i) for i in range(4)]\n"
        "    with multiprocessing.get_context('spawn').Pool(2) as pool: assert pool.map(work, range(4)) == want\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_exit_with_sleeping_workers() -> None:
    """The interpreter ends at once and cleanly, whether workers sleep or still look for work."""
    for wait in ("0", "0.3"):
        code = (
            "import numpy as np, groupnorm as gn, time\n"
            f"gn.group_norm(np.ones((8, 64, 64, 64), 'f4'), 8); time.sleep({wait}); print('done', flush=True)\n"
        )
        assert python(code, GROUPNORM_NUM_THREADS="4").strip() == "done"


def test_sleeping_workers_cost_nothing() -> None:
    code = (
        "import numpy as np, groupnorm as gn, time\n"
        "gn.group_norm(np.ones((8, 64, 64, 64), 'f4'), 8); time.sleep(0.2)\n"
        "a = time.process_time(); time.sleep(1); print(time.process_time() - a)\n"
    )
    assert float(python(code, GROUPNORM_NUM_THREADS="4")) < 0.1


# ---- compiled kernels on disk ----------------------------------------------------------------------------------------

CALL = (
    "import numpy as np, groupnorm as gn\n"
    "x = np.random.default_rng(0).standard_normal((2, 32, 64, 64)).astype('f4')\n"
    "print(float(np.abs(gn.group_norm(x, 8)).sum()))\n"
)


def test_two_processes_fill_one_empty_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", CALL], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    found = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], found
    assert found[0] == found[1]
    assert found[0][1] == ""
    assert list((tmp_path / "cache").rglob("*.nbc"))
    assert python(CALL, NUMBA_CACHE_DIR=str(tmp_path / "cache")) == found[0][0]  # and both left it in order


def test_truncated_cache(tmp_path: Path) -> None:
    """What a killed process or a full disk may leave behind is compiled anew."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    want = python(CALL, **cache)
    for data in (tmp_path / "cache").rglob("*.nbc"):
        data.write_bytes(data.read_bytes()[:100])
    assert python(CALL, **cache) == want


def test_installed_where_nothing_can_be_written(tmp_path: Path) -> None:
    """No NUMBA_CACHE_DIR, and every folder that Numba would make for its cache has a file in its place: that stops root
    as well. The kernels are compiled anew in each process."""
    copy = tmp_path / "site"
    shutil.copytree(SOURCE / "groupnorm", copy / "groupnorm", ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    for folder in [copy / "groupnorm", *(p for p in (copy / "groupnorm").rglob("*") if p.is_dir())]:
        (folder / "__pycache__").write_text("not a folder")
    home = tmp_path / "home"
    home.write_text("not a folder")
    nowhere = {"NUMBA_CACHE_DIR": None, "HOME": str(home), "XDG_CACHE_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1",
               "IPYTHONDIR": None}  # fmt: skip
    before = set(copy.rglob("*"))
    assert python(CALL, source=copy, **nowhere) == python(CALL)
    assert set(copy.rglob("*")) == before


def test_no_more_threads() -> None:
    """Where the system starts no thread, those that are there do the work."""
    done = python("""
import threading
import numpy as np, groupnorm as gn

def start(self):
    raise RuntimeError("can't start new thread")

x = np.random.default_rng(0).standard_normal((4, 32, 64, 64)).astype(np.float32)
gn.set_num_threads(1)
want = gn.group_norm(x, 4)
threading.Thread.start = start
gn.set_num_threads(4)
print(all(np.array_equal(gn.group_norm(x, 4), want) for _ in range(3)))
""")
    assert done.strip() == "True"


def test_a_containers_quota_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("groupnorm._core.threads._CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)), raising=False)
    assert usable_cpus() == 96
    for text, cpus in (("max 100000", 96), ("400000 100000", 4), ("150000 100000", 2), ("1000 100000", 1), ("", 96)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert usable_cpus() == cpus
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    for text, cpus in (("-1", 96), ("300000", 3)):
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(text + "\n")
        assert usable_cpus() == cpus
