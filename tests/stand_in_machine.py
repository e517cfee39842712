"""A roofline for tests of what asks it: every choice takes as long as its bytes, on no machine in particular."""

from math import prod
from types import SimpleNamespace

from groupnorm.errors import OptionError


def roofline_of(slow):
    """A `roofline` for which num_groups takes slow.get(num_groups, 1) times as long; "H200" is no CPU."""

    def roofline(
        shape, num_groups, *, dtype="float32", layout="NCHW", direction="forward", activation=None, machine=None
    ):
        assert layout in {"NCHW", "NHWC"}
        assert shape[1 if layout == "NCHW" else -1] % num_groups == 0
        if machine not in {None, "H200"}:
            raise OptionError(f"machine must be one of H200: got {machine!r}")
        time_s = 8 * prod(shape) / 1e10 * slow.get(num_groups, 1)
        return SimpleNamespace(time_s=time_s, bound="memory", predicted_s=None if machine else 2 * time_s,
                               machine=SimpleNamespace(name=machine or "a computer"))  # fmt: skip

    return roofline
