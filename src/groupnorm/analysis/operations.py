"""How much Group Normalization computes: floating-point operations, and operations on vectors by kind, for one element.

Flops are those of the formulas: statistics as sums of d = x - pivot and d*d, centred gradients; a multiply-add is two,
and an exponential, an erf, a tanh or a division is one, which no machine does faster. Operations are those of the
kernels: counted from `_engines/cpu` for CPUs, where an exponential is a polynomial and a division four operations; for
GPUs, which have units for exponentials and reciprocals, from the shortest sequence of their instructions.
"""

from typing import NamedTuple

__all__ = ["PHASES", "Phase", "flops_per_element", "operations_per_element"]


class Phase(NamedTuple):
    """What one pass over the data does for one element. `stored` counts arrays of x's shape that are written."""

    name: str
    loaded: int
    stored: int
    arithmetic: int
    flops: int


PHASES = {  # direction -> what is done to every element, in order
    "forward": (
        Phase("statistics", 1, 0, 3, 4),  # d = x - pivot; s += d; q += d*d
        Phase("normalize", 1, 1, 2, 3),  # y = (x - m)*a + b
    ),
    "backward": (
        Phase("sums", 2, 0, 5, 6),  # h = (x - m)*r; sums of dz, dz*h and h
        Phase("gradient", 2, 1, 4, 6),  # h again; dx = dz*a + h*k2 + k3
    ),
}
_EXPONENTIAL = {True: 11, False: 14}  # operations of e^-|z| on a CPU, for 16-bit results and for float32


class _Activation(NamedTuple):
    """What act(z), or the product dy*act'(z), takes for one element."""

    flops: int
    cpu: int  # operations but for exponentials
    exponentials: int
    gpu: int


_ACTIVATIONS = {
    "relu": (_Activation(1, 2, 0, 1), _Activation(1, 5, 0, 2)),
    "silu": (_Activation(4, 9, 1, 5), _Activation(7, 13, 1, 9)),
    "gelu": (_Activation(5, 23, 1, 16), _Activation(11, 41, 2, 24)),
    "gelu_tanh": (_Activation(8, 12, 1, 9), _Activation(16, 23, 1, 16)),
    "sigmoid": (_Activation(3, 12, 1, 4), _Activation(6, 15, 1, 7)),
    "tanh": (_Activation(1, 26, 1, 5), _Activation(4, 29, 1, 7)),
    "hardswish": (_Activation(4, 7, 0, 4), _Activation(4, 6, 0, 5)),
}


def flops_per_element(direction: str, activation: str | None) -> int:
    """Floating-point operations for one element of x; those for one group or channel are left out. Backward computes z
    again where there is an activation.
    """
    flops = sum(phase.flops for phase in PHASES[direction])
    if activation is None:
        return flops
    return flops + _ACTIVATIONS[activation][direction == "backward"].flops + (2 if direction == "backward" else 0)


def operations_per_element(direction: str, activation: str | None, dtype: str, *, kind: str = "cpu") -> dict[str, int]:
    """Operations on vectors for one element, by kind: divided by the lanes of a vector they are instructions. The
    conversion of 16-bit types counts one for each load and store. kind: of machine, "cpu" or "gpu".
    """
    phases = PHASES[direction]
    loaded, stored = sum(phase.loaded for phase in phases), sum(phase.stored for phase in phases)
    short = dtype in ("float16", "bfloat16")
    act = 0
    if activation is not None:
        found = _ACTIVATIONS[activation][direction == "backward"]
        act = found.gpu if kind == "gpu" else found.cpu + found.exponentials * _EXPONENTIAL[short]
        act += direction == "backward"  # z = xhat*a + b
    return {
        "load": loaded,
        "store": stored,
        "arithmetic": sum(phase.arithmetic for phase in phases),
        "activation": act,
        "conversion": loaded + stored if short else 0,
    }
