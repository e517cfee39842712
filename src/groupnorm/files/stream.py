"""From file to file: one thread reads the next box while another writes the last one and this one computes."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from groupnorm._core.atomic import PendingFile, commit
from groupnorm._core.layout import channel_axis
from groupnorm._core.problem import check_activation, check_eps, check_num_groups
from groupnorm.errors import DtypeError, FileError, OptionError, ShapeError
from groupnorm.files.boxes import Box, Grid, size
from groupnorm.files.report import Report, Timeline
from groupnorm.files.sink import Sink, refuse_loss, write_arrays
from groupnorm.files.source import PathLike, Source, locate, read_vector
from groupnorm.files.work import Work

__all__ = ["LEAST_MEMORY", "group_norm_file"]

LEAST_MEMORY = 1 << 16  # bytes; below, a run would be all system calls
_WISH = (
    1 << 25
)  # bytes of one array in a box: long enough for disk and kernel alike, short enough that the three overlap


class _Step(NamedTuple):
    """One box to be done in one way. `first` marks the beginning of a unit, `unit` is its box."""

    way: str  # forward, backward; in pieces measure, then normalize, or add_up and correct
    box: Box
    unit: Box
    first: bool


class _Cut(NamedTuple):
    """How a file is cut: the most elements of a box that must not be, ought not be, and of a piece; and what comes of
    it.
    """

    limit: int
    wish: int
    piece: int
    road: str
    largest: int  # elements of the largest box
    elements: int  # that all passes read


def group_norm_file(
    x: PathLike, y: PathLike, num_groups: int, *, weight: PathLike | None = None, bias: PathLike | None = None,
    eps: float = 1e-5, layout: str = "NCHW", activation: str | None = None, uneven: bool = False,
    stats: PathLike | None = None, backward: PathLike | None = None, max_memory: int = 1 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> Report:  # fmt: skip
    """Write to file y the `group_norm` of the array in file x; with `backward`, a file of dy, write dx instead.

    Every file is .npy, .npz or .safetensors; one of several arrays is named after a colon, "x.npz:name". x may be
    stored in C or Fortran order and in any byte order; y has its shape, type and order, little-endian. weight, bias:
    (C,). `stats` names a .npz or .safetensors file that gets mean and rstd, (N, G), and with `backward` dweight and
    dbias where there is a weight or a bias. `max_memory` bounds the bytes of array data in memory; a sample, or a
    group, that is larger is done in parts. `progress(done, total)` is called with bytes after each part. Other
    arguments are those of `group_norm`.

    Each output appears whole or not at all, and all of them only when all are on the disk. Returns a `Report`. Raises
    FileError, and what `group_norm` raises for its arguments, before anything is written where the fault can be seen by
    then. Cost: one pass over x, or two (three backward, two over dy) where a group does not fit in max_memory.
    """
    started = time.perf_counter()
    backward_given = backward is not None
    if type(max_memory) is not int or max_memory < LEAST_MEMORY:
        raise OptionError(f"max_memory must be a whole number of bytes, at least {LEAST_MEMORY}: got {max_memory!r}")
    with ExitStack() as stack:
        sources = [stack.enter_context(Source(path)) for path in (x, backward) if path is not None]
        form = sources[0].form
        if any(source.form[:3] != form[:3] for source in sources):
            got = sources[1].form
            kind = DtypeError if got.dtype != form.dtype else ShapeError
            raise kind(f"dy must have x's shape, type and order: got {_describe(got)}, x is {_describe(form)}")
        grid = _grid(form, num_groups, layout, uneven)
        channels = grid.edges[-1]
        eps, activation = check_eps(eps), check_activation(activation)
        weights = None if weight is None else read_vector(weight, channels, "weight")
        biases = None if bias is None else read_vector(bias, channels, "bias")
        keep_stats = stats is not None
        kept_bytes = 2 * 8 * grid.shape[grid.batch] * (len(grid.edges) - 1)
        if keep_stats and kept_bytes > max_memory:
            raise OptionError(
                f"max_memory must hold the stats, {kept_bytes} bytes: got {max_memory}; raise it, or drop stats"
            )
        work = Work(grid, weights, biases, eps, layout, activation, uneven, keep_stats, form.dtype)
        cut = _cut(grid, form, max_memory, backward_given)
        _check_different([x, backward, weight, bias], y, stats)
        stats_path, named = (None, None) if stats is None else locate(stats)
        if named:
            raise FileError(
                f"{stats_path}: stats are several arrays with names of their own: got :{named}; leave it away"
            )
        if stats_path is not None and stats_path.suffix.lower() == ".npy":
            raise FileError(f"{stats_path}: .npy holds one array, stats are several; name a .npz or .safetensors file")

        sink = Sink(y, form, sources[0].member or ("dx" if backward_given else "y"))
        stack.callback(sink.discard)
        stats_file = None
        if stats_path is not None:
            gradients = (("dweight", weights), ("dbias", biases))
            written = [name for name, of in gradients if backward_given and of is not None]
            refuse_loss(stats_path, ("mean", "rstd", *written))
            stats_file = PendingFile(stats_path)
            stack.callback(stats_file.discard)
        if cut.road == "pieces":
            for source in sources:
                source.spool(sink.pending.target.parent)
        start = time.perf_counter()
        work.warm_up(grid.everything(), backward_given)
        startup_s = time.perf_counter() - start

        timeline = Timeline()
        bytes_read, bytes_written, parts = _stream(sources, sink, grid, cut, work, timeline, progress)
        for source in sources:
            source.finish()
        with timeline.span("write"):
            sink.finish()
            if stats_file is not None and stats_path is not None:
                arrays: dict[str, Any] = dict(zip(("mean", "rstd"), work.stats or (), strict=True))
                if backward_given:
                    arrays |= {} if weights is None else {"dweight": work.dweight.astype(weights.dtype)}
                    arrays |= {} if biases is None else {"dbias": work.dbias.astype(biases.dtype)}
                write_arrays(stats_file, stats_path.suffix.lower(), arrays)
            commit([sink.pending] if stats_file is None else [sink.pending, stats_file])
    return Report(
        x=os.fspath(x), y=os.fspath(y), shape=form.shape, dtype=form.dtype.name, num_groups=int(num_groups),
        road=cut.road, parts=parts, bytes_read=bytes_read,
        bytes_written=bytes_written, bytes_computed=bytes_read + bytes_written,
        read_s=timeline.busy_s("read"), compute_s=timeline.busy_s("compute"), write_s=timeline.busy_s("write"),
        disk_s=timeline.busy_s("read", "write"), total_s=time.perf_counter() - started, startup_s=startup_s,
    )  # fmt: skip


# ---- the plan --------------------------------------------------------------------------------------------------------


def _describe(form: Any) -> str:
    return f"{form.dtype.name} {form.shape}, {'Fortran' if form.fortran else 'C'} order"


def _grid(form: Any, num_groups: int, layout: str, uneven: bool) -> Grid:
    rank = len(form.shape)
    axis = channel_axis(layout, rank)
    channels = form.shape[axis]
    groups = check_num_groups(num_groups, channels, uneven)
    edges = (*range(0, groups * (channels // groups), channels // groups), channels)
    if form.fortran:
        return Grid(form.shape[::-1], rank - 1, rank - 1 - axis, edges)
    return Grid(form.shape, 0, axis, edges)


def _cut(grid: Grid, form: Any, max_memory: int, backward: bool) -> _Cut:
    """How many elements a box may have, so that all that is in memory at one time stays within max_memory."""
    itemsize = form.dtype.itemsize
    # Arrays of a box's size: two of each input (one is read while the other is worked on), two or three of the output.
    # An engine copies what lies in Fortran order. Backward in pieces makes xhat, z, dz and two results that are thrown
    # away, and of 16-bit inputs copies, all in float32 at least.
    whole = (7 if backward else 4) + (3 if form.fortran else 0)
    piece = whole + (0 if not backward else 14 if itemsize == 2 else 5)
    limit = max(1, max_memory // (whole * itemsize))
    wish = max(1, min(limit, _WISH // itemsize))
    most = max(1, min(wish, max_memory // (piece * itemsize)))
    road, largest, elements = "samples", 0, 0
    for unit in grid.units(wish, limit):
        count = size(unit.box)
        if not unit.whole:
            road = "pieces"
        elif road == "samples" and grid.groups(unit.box) != (0, len(grid.edges) - 1):
            road = "groups"
        largest = max(largest, count if unit.whole else most)
        elements += count * ((2 if unit.whole else 5) if backward else (1 if unit.whole else 2))
    return _Cut(limit, wish, most, road, largest, elements)


def _steps(grid: Grid, cut: _Cut, backward: bool) -> Iterator[_Step]:
    for unit in grid.units(cut.wish, cut.limit):
        if unit.whole:
            yield _Step("backward" if backward else "forward", unit.box, unit.box, True)
            continue
        first = True
        for way in ("measure", "add_up", "correct") if backward else ("measure", "normalize"):
            for box in grid.pieces(unit.box, cut.piece):
                yield _Step(way, box, unit.box, first)
                first = False


def _check_different(inputs: list[PathLike | None], y: PathLike, stats: PathLike | None) -> None:
    """FileError if an output is one of the inputs, by whatever name, or both outputs are one file."""
    outputs = [locate(path)[0] for path in (y, stats) if path is not None]
    for path in (locate(given)[0] for given in inputs if given is not None):
        for output in outputs:
            if _same(path, output):
                raise FileError(f"{output}: is the same file as the input {path}; write to another file")
    if len(outputs) == 2 and _same(*outputs):
        raise FileError(f"{outputs[0]}: is named for both the result and the stats; write them to two files")


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:  # one of them is not there yet
        return os.path.realpath(a) == os.path.realpath(b)


# ---- three threads ---------------------------------------------------------------------------------------------------


def _stream(
    sources: list[Source], sink: Sink, grid: Grid, cut: _Cut, work: Work, timeline: Timeline,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, int, int]:  # fmt: skip
    """Do every step: while one box is computed, the next one is read and the last one written.

    Returns bytes read, bytes written, and boxes written.
    """
    form, backward = sources[0].form, len(sources) == 2
    itemsize, moved, parts = form.dtype.itemsize, [0, 0], 0
    inputs = [[np.empty(cut.largest, form.dtype) for _ in sources] for _ in range(2)]
    # Backward makes its own output; in Fortran order what an engine fills is another copy anyway.
    outputs = [] if backward or form.fortran else [np.empty(cut.largest, form.dtype) for _ in range(2)]
    axes = tuple(range(len(grid.shape))) if not form.fortran else tuple(reversed(range(len(grid.shape))))

    def shaped(flat: Any, box: Box) -> Any:
        return flat[: size(box)].reshape([stop - start for start, stop in box]).transpose(axes)

    def read(step: _Step, into: list[Any]) -> list[Any]:
        needed = sources[:1] if step.way == "measure" else sources
        with timeline.span("read"):
            for source, flat in zip(needed, into, strict=False):
                raw = flat[: size(step.box)].view(f"u{itemsize}")
                if raw.size:
                    source.read_into(grid.offset(step.box) * itemsize, raw.view(np.uint8))
                if source.form.swapped:
                    raw.byteswap(inplace=True)
                moved[0] += raw.nbytes
        return [shaped(flat, step.box) for flat in into[: len(needed)]]

    def write(array: Any) -> None:
        flat = np.ascontiguousarray(array.transpose(axes)).reshape(-1).view(f"u{itemsize}")
        with timeline.span("write"):
            if flat.size:
                sink.write(flat if np.little_endian else flat.byteswap())
            moved[1] += flat.nbytes

    def compute(step: _Step, arrays: list[Any]) -> Any:
        if step.first:
            work.begin(step.unit)
        if not backward and step.way != "measure":
            arrays = [*arrays, shaped(outputs[parts % 2], step.box) if outputs else None]
        with timeline.span("compute"), np.errstate(all="ignore"):
            return getattr(work, step.way)(step.box, *arrays)

    with ThreadPoolExecutor(1, "groupnorm-read") as reader, ThreadPoolExecutor(1, "groupnorm-write") as writer:
        steps = _steps(grid, cut, backward)
        first = next(steps)
        reading = reader.submit(read, first, inputs[0])
        writing: Future[None] | None = None
        step: _Step | None = first
        turn, done = 0, 0
        while step is not None:
            arrays = reading.result()
            following = next(steps, None)
            if following is not None:
                reading = reader.submit(read, following, inputs[1 - turn])
            result = compute(step, arrays)
            if result is not None:
                if writing is not None:
                    writing.result()
                writing = writer.submit(write, result)
                parts += 1
            if progress is not None:
                done += sum(a.nbytes for a in arrays)
                progress(done, itemsize * cut.elements)
            step, turn = following, 1 - turn
        if writing is not None:
            writing.result()
    return moved[0], moved[1], parts
