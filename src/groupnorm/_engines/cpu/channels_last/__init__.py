"""Channels-last kernels: the channels of a position are neighbours, so lanes are channels and a group is a strip of
each row.

How a sample is cut depends on its shape alone, never on the batch or on threads, so results do not either:

- a *tile* is TILE rows (positions), summed a strip of channels after the other: a channel to a lane, as statistics.py
  says for chunks, and added up in float64;
- a *unit* is `p.unit` rows; the moments of its channels are kept in `work`;
- a *slab* is `p.slab` channels, whole groups of them; slabs do not depend on each other;
- a *task* is one slab of one sample, doing everything while the slab is in cache, or `p.per_task` units of all samples,
  doing one phase: MOMENTS (SUMS for backward), MERGE, which is one task a sample, and APPLY.

What each channel needs in APPLY lies in `rows`, as planes of C numbers of lane type: m, a, b for forward, m, r, a, b,
k2, k3 for backward.
"""

from groupnorm._engines.cpu.channels_last.backward import BACKWARD_PLANES, PLANES, backward_kernel
from groupnorm._engines.cpu.channels_last.forward import FORWARD_PLANES, forward_kernel
from groupnorm._engines.cpu.channels_last.moments import APPLY, MERGE, MOMENTS, SUMS, TILE

__all__ = ["APPLY", "BACKWARD_PLANES", "FORWARD_PLANES", "MERGE", "MOMENTS", "PLANES", "SUMS", "TILE",
           "backward_kernel", "forward_kernel"]  # fmt: skip
