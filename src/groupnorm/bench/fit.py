"""Fits the constants of the prediction to records of this engine; run it after the kernels or the records changed.

    python -m groupnorm.bench.fit results

Prints EFFORTS for `analysis/prediction.py`. The relative error is what is made small, and a record that is far off
counts less than one that is not (weights of an iteratively reweighted least absolute deviation). Needs SciPy.
"""

import sys
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from groupnorm.analysis.prediction import EFFORTS, Terms, terms
from groupnorm.bench.predictions import compare_records, load_figures
from groupnorm.bench.records import load

__all__ = ["fit"]

# Within these each constant has a meaning: nothing moves faster than the figures, and an effort is no refund.
_LOW = Terms(0.3, 1.0, 0.5, 0.0, 0.3, 0.0, 0.0)
_HIGH = Terms(2.5, 2.0, 6.0, 8.0, 4.0, 2e-6, 1e-7)
_ROUNDS = 8
_SMALLEST = 0.08  # errors below this are all the same to the fit


def fit(results: Path) -> dict[tuple[bool, str], Terms]:
    """EFFORTS that fit the records below `results` best, for each layout and direction."""
    from scipy.optimize import lsq_linear

    compared = compare_records(load(results), load_figures(results))
    found = {}
    for last, direction in EFFORTS:
        chosen = [each for each in compared
                  if (each.record.layout == "NHWC", each.record.direction) == (last, direction)]  # fmt: skip
        rows = np.array([_terms(each) for each in chosen])
        measured = np.array([each.measured_s for each in chosen])
        launch = np.array([each.roofline.machine.launch_s for each in chosen])
        weights = 1 / measured
        for _ in range(_ROUNDS):
            solved = lsq_linear(rows * weights[:, None], (measured - launch) * weights, bounds=(_LOW, _HIGH)).x
            error = np.abs((rows @ solved + launch) / measured - 1)
            weights = 1 / measured / np.sqrt(np.maximum(error, _SMALLEST))
        found[last, direction] = Terms(*(float(f"{number:.3g}") for number in solved))
    return found


def _terms(each: Any) -> Terms:
    n, c, *spatial = each.record.shape
    speeds = each.roofline.machine.for_threads(each.record.threads)
    return terms(
        n, c, prod(spatial), each.record.num_groups, dtype=each.record.dtype,
        channels_last=each.record.layout == "NHWC", direction=each.record.direction,
        activation=each.record.activation, speeds=speeds,
    )  # fmt: skip


if __name__ == "__main__":
    for key, efforts in fit(Path(sys.argv[1] if len(sys.argv) > 1 else "results")).items():
        print(f"    {key}: {tuple(efforts)},")
