"""How programs wait for one another: the only three places in the engine where they do.

Counters lie in GPU memory and need not be cleared by any launch, so that they survive CUDA graphs as they are: those of
`arrive` are 0 before a launch and again after it, those of `barrier` are 0 or 2^31. The two are never the same memory.

Order in memory: `debug_barrier` is __syncthreads, after which one thread adds to a counter with release semantics at
the device's scope; whoever then reads the counter with acquire semantics, followed by another __syncthreads, sees
everything that any thread of the first program wrote before. Floats are never added by atomics: what was left by parts
is summed in the order of the parts, so that results do not depend on who came first.
"""

import triton
import triton.language as tl

__all__ = ["arrive", "barrier", "wait_for"]


@triton.jit
def barrier(COUNTER, programs, first):
    """Return when so many programs have called this. `first` is True in exactly one of them.

    The counter flips its highest bit when all have come: the first one adds 2^31 - (programs - 1), the others 1 each,
    which makes 2^31 together. So it need not be cleared, and is ready for the next time.

    It cannot hang if all these programs run at the same time, which nothing but a cooperative launch promises: the
    driver refuses one whose programs do not fit the device together (CUDA error 720), it never queues a part of them.
    `launch.py` launches kernels with this call no other way, and takes another road where it is refused.
    """
    tl.debug_barrier()
    share = tl.where(first, -2147483648 - (programs - 1), 1)  # as int32: 2^31 is its smallest number
    old = tl.atomic_add(COUNTER, share, sem="release", scope="gpu")
    flipped = False
    while not flipped:
        now = tl.atomic_add(COUNTER, 0, sem="acquire", scope="gpu")  # one thread looks, not all of them
        flipped = ((old ^ now) & -2147483648) != 0
    tl.debug_barrier()


@triton.jit
def arrive(COUNTER):
    """Say that this program is done with its part, and give how many were before it."""
    tl.debug_barrier()
    before = tl.atomic_add(COUNTER, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before


@triton.jit
def wait_for(COUNTER, parts):
    """Return when so many programs have called `arrive`. It cannot hang if each of them is running already or done, and
    none of them waits before it arrives.
    """
    while tl.atomic_add(COUNTER, 0, sem="acquire", scope="gpu") < parts:
        pass
    tl.debug_barrier()
