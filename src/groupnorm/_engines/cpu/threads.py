"""A pool of threads for compiled kernels: starts a job in under a microsecond, and never waits for a thread that
sleeps.

A job is a kernel, the addresses of its arguments, and a number of tasks; whoever is free takes the next task. The
calling thread works too, and at the end waits only for workers that are inside a task: one that the system has not yet
woken, or has put aside, delays nobody. A worker looks for the next job for SPINS rounds and then sleeps in a lock of
the Python runtime, which needs no interpreter: a worker runs one compiled function for ever and never takes the GIL.

- Several Python threads at once: the first has the pool; the others do their jobs alone, on the thread that called.
- A forked child has none of the threads: it makes a pool of its own when it first needs one.
- Results do not depend on who does which task.
- Where PyTorch is loaded, its OpenMP team does the job in place of the workers. The team keeps every core busy for some
  milliseconds after each operation, looking for the next, and a worker of ours would wait that long for a core: between
  the layers of a model it would never get one. Not in a forked child, where a team that the parent used hangs.

How a worker may enter: it counts itself into RUNNING and looks at SEQUENCE again; the caller makes SEQUENCE even and
looks at RUNNING. Both are sequentially consistent, so either the worker sees that the job is over, or the caller sees
the worker.
"""

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from groupnorm._core.threads import is_forked
from groupnorm._engines.cpu.compiler import compiled, jitted
from groupnorm._engines.cpu.records import ARRAYS, CALL, call_at, plan_at

__all__ = ["MAX_WORKERS", "POOL", "Pool"]

SPINS = 4000  # rounds of a worker before it sleeps, about 60 us: longer than the gap between two layers of a model
MAX_WORKERS = 255

# Slots of the pool's state, in int64; each in a cache line of its own.
_OWNER, _SEQUENCE, _NEXT, _RUNNING, _JOB, _ENTERED, _ASLEEP = (
    0,
    8,
    16,
    24,
    32,
    40,
    48,
)  # _ASLEEP: a line for each worker
_KERNEL, _PLAN, _CALL, _TASKS, _WORKERS = range(_JOB, _JOB + 5)

# The pool's header, in int64: addresses of the state, of PyThread_release_lock, of None; where a tuple's items begin
# and where an array keeps the address of its data, in bytes from the start of the object; addresses of OpenMP's
# GOMP_parallel (0: there is no team to use) and omp_get_max_threads and of `_take_part`; then the locks of the workers.
_STATE, _RELEASE, _NONE, _ITEMS, _DATA, _PARALLEL, _TEAM_SIZE, _TAKE_PART, _LOCKS = range(9)

_I64 = ir.IntType(64)


def _slot(builder: Any, state: Any, index: Any) -> Any:
    return builder.inttoptr(builder.add(state, builder.mul(index, _I64(8))), _I64.as_pointer())


@intrinsic
def _get(typingctx: Any, state: Any, index: Any) -> Any:
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_slot(builder, *args), "seq_cst", 8)

    return types.int64(types.int64, types.int64), lower


@intrinsic
def _set(typingctx: Any, state: Any, index: Any, value: Any) -> Any:
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _slot(builder, args[0], args[1]), "seq_cst", 8)

    return types.void(types.int64, types.int64, types.int64), lower


def _read_modify_write(operation: str) -> Any:
    def typing(typingctx: Any, state: Any, index: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, _slot(builder, args[0], args[1]), args[2], "seq_cst")

        return types.int64(types.int64, types.int64, types.int64), lower

    return typing


_add = intrinsic(_read_modify_write("add"))  # both give the value before
_exchange = intrinsic(_read_modify_write("xchg"))


def _hint(builder: Any, name: str, arguments: list[Any]) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), arguments)


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tell the core that this is a waiting loop."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        machine = builder.module.triple
        if machine.startswith(("x86_64", "i686")):
            _hint(builder, "llvm.x86.sse2.pause", [])
        elif machine.startswith(("aarch64", "arm64")):
            _hint(builder, "llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)])  # YIELD

    return types.void(), lower


@intrinsic
def _invoke(typingctx: Any, function: Any, plan: Any, call: Any, task: Any, worker: Any) -> Any:
    """Call a kernel by its address."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.void(*[types.int64] * 5), lower


@intrinsic
def _lock_call(typingctx: Any, function: Any, lock: Any, flag: Any) -> Any:
    """Call PyThread_acquire_lock(lock, flag); PyThread_release_lock takes no flag and does not look at it."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        int32 = ir.IntType(32)
        kind = ir.FunctionType(int32, [_I64, int32])
        arguments = [args[1], builder.trunc(args[2], int32)]
        return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), arguments), _I64)

    return types.int64(*[types.int64] * 3), lower


@intrinsic
def _team_size(typingctx: Any, function: Any) -> Any:
    """Call omp_get_max_threads: how many threads this thread's team has."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), []), _I64)

    return types.int64(types.int64), lower


@intrinsic
def _in_team(typingctx: Any, function: Any, body: Any, state: Any) -> Any:
    """Call GOMP_parallel(body, state, 0, 0): every thread of the team calls body(state). The team keeps its size:
    another one would end threads or start new ones each time.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        int32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, int32, int32])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], args[2], int32(0), int32(0)])

    return types.void(*[types.int64] * 3), lower


def _take_part(state: int) -> None:
    """What a thread of an OpenMP team does: as many of them as the job wants take tasks."""
    number = _add(state, _ENTERED, 1)
    if number <= _get(state, _WORKERS):
        kernel, plan, call, tasks = _get(state, _KERNEL), _get(state, _PLAN), _get(state, _CALL), _get(state, _TASKS)
        task = _add(state, _NEXT, 1)
        while task < tasks:
            _invoke(kernel, plan, call, task, number)
            task = _add(state, _NEXT, 1)


def _work(state: int, number: int, lock: int, acquire: int) -> None:
    """What worker `number` does for ever."""
    done = 0
    spins = 0
    while True:
        sequence = _get(state, _SEQUENCE)
        if sequence % 2 == 1 and sequence != done and number < _get(state, _WORKERS):
            _add(state, _RUNNING, 1)
            if _get(state, _SEQUENCE) == sequence:
                kernel, plan = _get(state, _KERNEL), _get(state, _PLAN)
                call, tasks = _get(state, _CALL), _get(state, _TASKS)
                task = _add(state, _NEXT, 1)
                while task < tasks:
                    _invoke(kernel, plan, call, task, number + 1)
                    task = _add(state, _NEXT, 1)
                done = sequence
            _add(state, _RUNNING, -1)
            spins = 0
        elif spins < SPINS:
            _pause()
            spins += 1
        else:
            asleep = _ASLEEP + 8 * number
            _set(state, asleep, 1)
            sequence = _get(state, _SEQUENCE)  # a job may have been opened before the flag was up
            open_job = sequence % 2 == 1 and sequence != done and number < _get(state, _WORKERS)
            if not open_job or _exchange(state, asleep, 0) == 0:  # 0: the caller has seen the flag and will wake us
                _lock_call(acquire, lock, 1)
            spins = 0


@intrinsic
def _gather(typingctx: Any, pool: Any, arrays: Any) -> Any:
    """The address of a CALL, on the stack, with the data addresses of a tuple of NumPy arrays, 0 for None."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pool, arrays = args
        none, items, data = (builder.load(_slot(builder, pool, _I64(i))) for i in (_NONE, _ITEMS, _DATA))
        call = cgutils.alloca_once(builder, ir.ArrayType(_I64, CALL.itemsize // 8))
        address = builder.ptrtoint(call, _I64)
        first = builder.add(arrays, items)
        for i in range(len(ARRAYS)):
            array = builder.load(_slot(builder, first, _I64(i)))
            is_none = builder.icmp_signed("==", array, none)
            safe = builder.select(is_none, builder.sub(first, data), builder.add(array, _I64(0)))  # any readable place
            where = builder.load(_slot(builder, builder.add(safe, data), _I64(0)))
            builder.store(builder.select(is_none, _I64(0), where), _slot(builder, address, _I64(i)))
        return address

    return types.int64(types.int64, types.int64), lower


def _launch(pool: int, plan: int, arrays: int, call: int, way: int) -> None:
    """Do a plan and those that follow it, each with all its tasks.

    `arrays` is the address of a tuple of NumPy arrays in the order of ARRAYS, or 0, and then `call` that of a CALL.
    """
    if arrays != 0:
        call = _gather(pool, arrays)
        call_at(call).way = way
    while plan != 0:
        _do_tasks(pool, plan, call)
        plan = plan_at(plan).next


@jitted
def _do_tasks(pool: int, plan: int, call: int) -> None:
    """Do all tasks of a job, with the help of the plan's number of workers if the pool is free."""
    job = plan_at(plan)
    kernel, tasks, workers = job.kernel, job.tasks, job.workers
    state = _get(pool, _STATE)
    if workers == 0 or tasks < 2 or _exchange(state, _OWNER, 1) == 1:
        for task in range(tasks):
            _invoke(kernel, plan, call, task, 0)
        return
    _set(state, _KERNEL, kernel)
    _set(state, _PLAN, plan)
    _set(state, _CALL, call)
    _set(state, _TASKS, tasks)
    _set(state, _WORKERS, workers)
    _set(state, _NEXT, 0)
    if _get(pool, _PARALLEL) != 0 and _team_size(_get(pool, _TEAM_SIZE)) > 1:
        _set(state, _ENTERED, 0)
        _in_team(_get(pool, _PARALLEL), _get(pool, _TAKE_PART), state)
        _set(state, _OWNER, 0)
        return
    _add(state, _SEQUENCE, 1)
    for number in range(workers):
        if _get(state, _ASLEEP + 8 * number) == 1 and _exchange(state, _ASLEEP + 8 * number, 0) == 1:
            _lock_call(_get(pool, _RELEASE), _get(pool, _LOCKS + number), 0)
    task = _add(state, _NEXT, 1)
    while task < tasks:
        _invoke(kernel, plan, call, task, 0)
        task = _add(state, _NEXT, 1)
    _add(state, _SEQUENCE, 1)
    while _get(state, _RUNNING) != 0:
        _pause()
    _set(state, _OWNER, 0)


class Pool:
    """The workers of this process, made when they are first needed."""

    def __init__(self) -> None:
        self._workers = -1  # -1: not even the compiled functions are there
        self._most = MAX_WORKERS  # fewer where the system has no more threads
        self._looked_for_team = False
        self._growing = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def run(self, plan: int, arrays: tuple[Any, ...], way: int, threads: int) -> None:
        """Do the job of the PLAN at this address, and those that follow it, on NumPy arrays, given in the order of
        ARRAYS, None where there is none; with `threads` at most.

        The arrays' addresses are read where NumPy's C interface has them, in compiled code: asking through Python would
        take a microsecond for each.
        """
        self._prepare(threads)
        if self._reads_objects:
            self._launch(self._address, plan, id(arrays), 0, way)
        else:
            call = np.array([*(0 if a is None else a.ctypes.data for a in arrays), way], np.int64)
            self._launch(self._address, plan, 0, call.ctypes.data, way)

    def run_at(self, plan: int, call: bytes, threads: int) -> None:
        """The same with the CALL itself, as it lies in memory: for callers that have addresses and no arrays."""
        if threads > 1 or self._workers < 0:
            self._prepare(threads)
        self._launch_at(self._address, plan, 0, call, 0)

    @contextlib.contextmanager
    def own_threads(self) -> Iterator[None]:
        """Meanwhile jobs are done by this pool's own threads, as many as they ask for, not by the team of PyTorch,
        which has as many as `torch.set_num_threads` says.
        """
        if self._workers < 0:
            self._grow(0)
        looked, team = self._looked_for_team, int(self._header[_PARALLEL])
        self._looked_for_team, self._header[_PARALLEL] = True, 0
        try:
            yield
        finally:
            self._looked_for_team, self._header[_PARALLEL] = looked, team

    def _prepare(self, threads: int) -> None:
        if min(threads - 1, self._most) > self._workers:
            self._grow(min(threads - 1, self._most))
        if threads > 1 and not self._looked_for_team and "torch" in sys.modules:
            self._find_team()

    def _forget(self) -> None:
        """In a forked child: the threads are gone, and the state may have been caught in the middle of a job."""
        self._workers, self._most = -1, MAX_WORKERS
        self._growing = threading.Lock()

    def _find_team(self) -> None:
        """Let jobs be done by the OpenMP team of PyTorch, whose runtime is visible to the whole process."""
        with self._growing:
            program: Any = ctypes.CDLL(None) if os.name == "posix" else None
            names = ("GOMP_parallel", "omp_get_max_threads")
            if not is_forked() and all(hasattr(program, name) for name in names):
                self._take_part = compiled(_take_part, "threads_take_part", 1)
                self._header[_TAKE_PART] = self._take_part.address
                self._header[_TEAM_SIZE] = ctypes.cast(program.omp_get_max_threads, ctypes.c_void_p).value or 0
                self._header[_PARALLEL] = ctypes.cast(program.GOMP_parallel, ctypes.c_void_p).value or 0
            self._looked_for_team = True

    def _grow(self, workers: int) -> None:
        with self._growing:
            if self._workers < 0:
                self._start()
            for number in range(self._workers, workers):
                lock = ctypes.pythonapi.PyThread_allocate_lock()
                ctypes.pythonapi.PyThread_acquire_lock(ctypes.c_void_p(lock), 1)
                self._header[_LOCKS + number] = lock
                arguments = (int(self._header[_STATE]), number, lock, self._acquire)
                thread = threading.Thread(target=self._work, args=arguments, name=f"groupnorm-{number}", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # a limit of the system, or the interpreter ends: those at hand do all the work
                    self._most = number
                    return
                self._workers = number + 1

    def _start(self) -> None:
        """A new state without workers. The memory of an old one is left to the threads that hold its address."""
        ctypes.pythonapi.PyThread_allocate_lock.restype = ctypes.c_void_p
        acquire, release = (
            ctypes.cast(getattr(ctypes.pythonapi, f"PyThread_{name}_lock"), ctypes.c_void_p).value
            for name in ("acquire", "release")
        )
        self._acquire = acquire
        self._state = np.zeros(_ASLEEP + 8 * (MAX_WORKERS + 1), np.int64)
        self._header = np.zeros(_LOCKS + MAX_WORKERS, np.int64)
        self._header[_STATE] = self._state.ctypes.data + -self._state.ctypes.data % 64
        self._header[_RELEASE] = release or 0
        self._header[_NONE], self._header[_ITEMS] = id(None), tuple.__basicsize__
        self._header[_DATA] = object.__basicsize__  # PyArrayObject: the object's head, then the address of the data
        self._reads_objects = _objects_are_as_expected()
        self._address = self._header.ctypes.data
        self._work = compiled(_work, "threads_work", 4).ctypes
        launch = compiled(_launch, "threads_launch", 5)
        self._launch = launch.ctypes
        kinds = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64)  # the bytes in place
        self._launch_at = ctypes.CFUNCTYPE(None, *kinds)(launch.address)
        self._workers = 0


def _objects_are_as_expected() -> bool:
    """Whether this interpreter and this NumPy lay out tuples and arrays as CPython and NumPy's C interface do."""
    if sys.implementation.name != "cpython":
        return False
    probe = (np.arange(3), np.arange(5.0)[2:])
    for i, array in enumerate(probe):
        item = ctypes.c_void_p.from_address(id(probe) + tuple.__basicsize__ + 8 * i).value
        if (
            item != id(array)
            or ctypes.c_void_p.from_address(id(array) + object.__basicsize__).value != array.ctypes.data
        ):
            return False
    return True


POOL = Pool()
