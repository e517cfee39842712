"""From a plan and addresses in memory to launches.

A kernel is launched the first time as Triton's users do, `kernel[grid](...)`: that compiles it. What this gives is
kept, and launched from then on without the binder, the cache key and the hooks in between, 3 to 4 us instead of 9 to 12
(of reports by others; not measured here). That is a private interface of Triton: for versions other than the tested
ones, and where it looks different, every launch goes the public way.
"""

import operator
from collections.abc import Callable
from typing import Any

from groupnorm._engines.gpu import parameters, resident, split, ticketed, two_pass
from groupnorm._engines.gpu.compiler import INTERPRETED, TESTED, VERSION
from groupnorm._engines.gpu.cut import MOST_WARPS
from groupnorm._engines.gpu.plan import Launch, Plan

__all__ = ["ARRAYS", "KERNELS", "TooLargeError", "array_types", "compiler_options", "run"]

KERNELS: dict[str, Any] = {
    name: getattr(module, name)
    for module in (resident, split, ticketed, two_pass, parameters)
    for name in module.__all__
}

# Every array that a kernel may take, in the order in which `run` is given their addresses.
ARRAYS = (
    "X", "Y", "WEIGHT", "BIAS", "SCALE", "SHIFT", "RESIDUAL", "MASK", "MEAN", "RSTD", "MOMENTS", "DY", "DX", "DWEIGHT",
    "DBIAS", "DSCALE", "DSHIFT", "DRESIDUAL", "COUNTERS", "PARTIALS", "SUMS", "TOTALS",
    "LOW", "LOST",
)  # fmt: skip
_PLACES = {name: place for place, name in enumerate(ARRAYS)}
_PUBLIC_ONLY = not TESTED[0] <= VERSION <= TESTED[1]


class TooLargeError(Exception):
    """The driver refused a launch: what must run at the same time does not fit the device. Nothing was done."""


def array_types(plan: Plan) -> dict[str, str]:
    """The type of the elements of each array: names of dtypes; masks are bytes."""
    p = plan.problem
    acc = "float64" if p.dtype == "float64" else "float32"
    types = dict.fromkeys(("X", "Y", "RESIDUAL", "DY", "DX", "DRESIDUAL"), p.dtype)
    types |= dict.fromkeys(("MEAN", "RSTD", "PARTIALS", "SUMS", "TOTALS", "LOW", "LOST"), acc)
    for name in ("weight", "bias", "scale", "shift"):
        types[name.upper()] = types[f"D{name.upper()}"] = getattr(p, name) or acc
    return types | {"MASK": "uint8", "MOMENTS": "float64", "COUNTERS": "int32"}


def run(plan: Plan, addresses: tuple[int, ...], aligned: bool, device: int, stream: int) -> None:
    """Launch all kernels of a plan. addresses: where the arrays begin, in the order of ARRAYS, 0 for none. aligned:
    whether 16 bytes divide each of them.
    """
    key = device, aligned or tuple(address & 15 for address in addresses), tuple(map(operator.not_, addresses))
    ready = plan.ready.get(key)
    if ready is None:
        plan.ready[key] = [_first(launch, array_types(plan), addresses) for launch in plan.launches]
        return
    for launch, go in zip(plan.launches, ready, strict=True):
        try:
            go(addresses, stream)
        except RuntimeError as error:
            _raise_if_too_large(launch, error)
            raise


def compiler_options(launch: Launch, compiled: Callable[[dict[str, Any]], tuple[int, int]]) -> dict[str, Any]:
    """What Triton is told beside the constants. `compiled` gives the registers and spills that some options lead to.

    FP fusion: multiply-add in one rounding, which Triton will stop doing unasked. How many registers ptxas takes is
    erratic: it may spill a little with 16 warps and need fewer registers with 8, or spill to stay below a number that
    nobody asked for. So what spills is tried with half the warps and with the plan's number given, and where no plan
    counts on so many programs at once with twice the warps; the first that does not spill, or else the one that spills
    least, is taken.
    """
    common: dict[str, Any] = {"enable_fp_fusion": True}
    if launch.cooperative:
        common["launch_cooperative_grid"] = True
    if launch.multiprocessors > 1:
        common["num_ctas"] = launch.multiprocessors
    found: list[tuple[bool, int, int, dict[str, Any]]] = []
    more = launch.warps if launch.cooperative else min(2 * launch.warps, MOST_WARPS)
    for warps in dict.fromkeys((launch.warps, max(1, launch.warps // 2), more)):
        for bound in dict.fromkeys((None, launch.most_registers)):
            options = {**common, "num_warps": warps, **({} if bound is None else {"maxnreg": bound})}
            registers, spills = compiled(options)
            fits = launch.most_registers is None or registers <= launch.most_registers
            if fits and not spills:
                return options
            found.append((not fits, spills, len(found), options))
    return min(found, key=lambda tried: tried[:3])[3]


def _raise_if_too_large(launch: Launch, error: RuntimeError) -> None:
    """Raise TooLargeError if the driver says that a cooperative launch is too large or a cluster's size invalid, which
    comes from what else runs on the device.
    """
    message = str(error).lower()
    if (launch.cooperative and "cooperative launch" in message) or (
        launch.multiprocessors > 1 and "cluster misconfiguration" in message
    ):
        raise TooLargeError(f"{launch.kernel} does not fit the device as a whole: {error}") from error


class _Pointer:
    """An address with the type of what lies there: all that Triton asks of a tensor."""

    def __init__(self, address: int, dtype: str) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def _first(launch: Launch, types: dict[str, str], addresses: tuple[int, ...]) -> Callable[[tuple[int, ...], int], None]:
    """Launch a kernel the public way, and give a function that does it again, the short way if there is one."""
    kernel = KERNELS[launch.kernel]
    names = kernel.arg_names
    places = [_PLACES.get(name, -1) for name in names]
    given = {**launch.numbers, **launch.constants}

    def arguments(now: tuple[int, ...]) -> list[Any]:
        return [
            given[name] if name in given else (_pointer(now[place], types[name]) if place >= 0 and now[place] else None)
            for name, place in zip(names, places, strict=True)
        ]

    def compile_with(options: dict[str, Any]) -> tuple[int, int]:
        made = kernel.warmup(*arguments(addresses), grid=launch.grid, **options)
        made.run  # noqa: B018 - loads it, after which the driver knows
        return getattr(made, "n_regs", 0), getattr(made, "n_spills", 0)

    options = {} if INTERPRETED else compiler_options(launch, compile_with)

    def again(now: tuple[int, ...], stream: int) -> Any:
        return kernel[launch.grid](*arguments(now), **options)

    try:
        compiled = again(addresses, 0)
    except RuntimeError as error:  # the driver's word for it, by way of Triton
        _raise_if_too_large(launch, error)
        raise
    if INTERPRETED or _PUBLIC_ONLY or not all(hasattr(compiled, n) for n in ("run", "function", "packed_metadata")):
        return again
    return _short(compiled, launch, names, places, given)


def _short(
    compiled: Any, launch: Launch, names: list[str], places: list[int], given: dict[str, Any]
) -> Callable[[tuple[int, ...], int], None]:
    """The launch of a compiled kernel without anything in between. Addresses go as whole numbers."""
    x, y, z = (*launch.grid, 1, 1)[:3]
    go, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    # Arrays come first or in between; one getter for all, absent ones and numbers come from behind the addresses.
    extra = [given[name] for name in names if name in given]
    count, behind = len(ARRAYS), iter(range(len(extra)))
    pick = operator.itemgetter(
        *(count + next(behind) if name in given else (place if place >= 0 else -1)
          for name, place in zip(names, places, strict=True))
    )  # fmt: skip
    tail = (*extra, 0)  # -1 is the 0 of an absent array

    def again(now: tuple[int, ...], stream: int) -> None:
        go(x, y, z, stream, function, metadata, None, None, None, *pick(now + tail))

    return again


def _pointer(address: int, dtype: str) -> Any:
    if not INTERPRETED:
        return _Pointer(address, dtype)
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    kind = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32, "float64": tl.float64,
            "uint8": tl.uint8, "int32": tl.int32}[dtype]  # fmt: skip
    pointer = tl.pointer_type(kind)
    return tl.core.tensor(TensorHandle(np.array([address], np.uint64), pointer), pointer)
