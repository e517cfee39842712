"""The least that must move between memory and whoever computes: every array read once, every result written once."""

from typing import NamedTuple

__all__ = ["ITEM_BYTES", "Traffic", "least_traffic"]

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Traffic(NamedTuple):
    """Bytes: read, written, and saved, which stay in memory from forward until backward."""

    read: int
    written: int
    saved: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def least_traffic(
    N: int, C: int, S: int, G: int, dtype: str, direction: str, *, affine: bool = True, scale_shift: bool = False,
    residual: bool = False, activation: str | None = None,
) -> Traffic:  # fmt: skip
    """The least traffic of one call, whatever the layout. An activation is computed and stored nowhere.

    direction: "forward" reads x and writes y; "backward" reads x, dy, mean and rstd and writes dx and the gradients of
    the parameters. affine: weight and bias, (C,), in x's dtype; scale_shift: scale and shift, (N, C); residual: an
    array like x, whose gradient is dz and written too; without an activation it is not read for that, and dz is dy.
    Saved for backward are x, the parameters, and mean and rstd (with a residual and an activation the residual too: the
    activation is computed again from it).
    """
    item = ITEM_BYTES[dtype]
    x = N * C * S * item
    of_channel, of_sample = (C * item if affine else 0), (N * C * item if scale_shift else 0)
    parameters = 2 * of_channel + 2 * of_sample
    statistics = 2 * N * G * (8 if dtype == "float64" else 4)
    extra = x if residual else 0
    again = extra if activation is not None else 0
    saved = x + parameters + statistics + again
    if direction == "forward":
        return Traffic(x + parameters + extra, x, saved)
    read = parameters
    if activation is None:  # shift is for z alone, which is computed for activations; bias for that and dscale
        read -= of_sample if scale_shift else of_channel
    return Traffic(2 * x + read + statistics + again, x + parameters + again, saved)
