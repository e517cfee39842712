"""Arrays in files, written and read the way users do: with NumPy and safetensors themselves."""

from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

__all__ = ["DTYPES", "load", "random", "save"]

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


def save(path, array, name="x"):
    """Write the array as the ending of `path` says; compressed if it is called deflated."""
    path = Path(path)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        (np.savez_compressed if "deflated" in path.name else np.savez)(path, **{name: array})
    else:
        safetensors.numpy.save_file({name: array}, path)
    return path


def load(path, name=None):
    """The array called `name`, or the only one. NumPy gives bfloat16 back as two bytes without a meaning."""
    path = Path(path)
    if path.suffix == ".npy":
        array = np.load(path)
    else:
        arrays = dict(np.load(path)) if path.suffix == ".npz" else safetensors.numpy.load_file(path)
        assert name is not None or len(arrays) == 1
        array = arrays[name] if name else next(iter(arrays.values()))
    return array.view(ml_dtypes.bfloat16) if array.dtype.kind == "V" else array


def random(shape, dtype="float32", seed=0, mean=3.0):
    return (np.random.default_rng(seed).normal(size=shape) + mean).astype(DTYPES[dtype])
