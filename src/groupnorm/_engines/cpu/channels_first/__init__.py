"""Channels-first kernels: the positions of a channel are neighbours, so a group is a few long runs.

How a group is cut depends on its shape alone, never on the batch or on threads, so results do not either:

- a *part* is one channel's positions, or a piece of them when there are more than PART;
- a *unit* is `p.unit` channels (as many as make UNIT elements) of one part; statistics are merged unit by unit;
- a *task* is `p.per_task` units, numbered through all groups. With whole groups as tasks one launch does everything
  while a group is in cache; with few large groups, one launch takes the moments of the units and a second applies them.

The matching phases are MOMENTS, MERGE (by group) and APPLY for forward, SUMS, MERGE and APPLY for backward; their sum,
in one launch, is the road of whole groups.
"""

from groupnorm._engines.cpu.channels_first.backward import backward_kernel
from groupnorm._engines.cpu.channels_first.forward import forward_kernel
from groupnorm._engines.cpu.channels_first.moments import APPLY, MERGE, MOMENTS, SUMS

__all__ = ["APPLY", "MERGE", "MOMENTS", "SUMS", "backward_kernel", "forward_kernel"]
