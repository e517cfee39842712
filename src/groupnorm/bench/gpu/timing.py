"""Microseconds on a GPU: in a graph, where nothing but the GPU counts, and from Python, where launching does.

Cold: a call works on one of several copies of its tensors, which together are much larger than L2, so that each finds
its data in memory as it does between two layers of a large network. Warm: on the same copy each time.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["ROTATED_BYTES", "copies_for", "from_python_us", "in_graph_us"]

ROTATED_BYTES = 256 << 20  # several times the largest L2
_SAMPLES = 7
_SAMPLE_S = 5e-3
_MOST_CALLS = 200


def copies_for(call_bytes: int, l2_bytes: int) -> int:
    """How many copies of a call's tensors are so large together that none of it is left in L2."""
    return max(2, min(64, max(ROTATED_BYTES, 4 * l2_bytes) // max(call_bytes, 1) + 1))


def in_graph_us(calls: Sequence[Callable[[], Any]]) -> float:
    """The median time of one of these calls, all captured into a CUDA graph one after the other. They have to be called
    once before, so that everything is compiled.
    """
    import torch

    cuda: Any = torch.cuda  # whose classes have no types
    stream = cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, min(_MOST_CALLS // len(calls), 20))
    kept = []  # results live as long as the graph: otherwise all calls would write to the same memory, which L2 holds
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            kept = [call() for call in calls]
    graph.replay()
    torch.cuda.synchronize()
    samples: list[float] = []
    for _ in range(_SAMPLES):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    del kept, graph
    return statistics.median(samples)


def from_python_us(calls: Sequence[Callable[[], Any]]) -> float:
    """The median time of one of these calls from Python, one after the other, until the GPU is done with all."""
    import torch

    for call in calls:
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    once_s = (time.perf_counter() - begin) / len(calls)
    rounds = max(1, min(_MOST_CALLS, int(_SAMPLE_S / max(once_s * len(calls), 1e-9))))
    samples = []
    for _ in range(_SAMPLES):
        begin = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - begin) * 1e6 / (rounds * len(calls)))
    return statistics.median(samples)
