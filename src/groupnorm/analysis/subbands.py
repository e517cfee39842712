"""A picture as 60 feature maps that add up to it again: what can be seen is changed feature by feature, then shown.

A picture (H, W, 3) is turned to three orthonormal colour axes, and each axis is cut by its spatial frequency: four
octaves, each in four orientations, then three coarser octaves and what is below them, in all directions alike. No
map is smaller than the picture, so maps are channels of one array; and the filters sum to 1 at every frequency, so the
inverse is a sum: exact, and linear. Neighbouring channels are the four orientations of one octave on one axis, or the
four coarse bands of one axis; so 15 groups are the filters of a scale, 3 groups are the colour axes.

Sources: Simoncelli and Freeman 1995, The steerable pyramid, for the orientations (the windows here are the squares of
theirs, because synthesis is a sum); Ohta, Kanade and Sakai 1980, Color information for region segmentation, for the
axes, which are nearly uncorrelated in photographs.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import comb, sqrt
from typing import Any

import numpy as np

from groupnorm.errors import OptionError, ShapeError

__all__ = ["CHANNELS", "SCALE_GROUPS", "check_picture", "join", "split", "subband_names"]

Array = Any

_AXES = {"luminance": (1, 1, 1), "red-blue": (1, 0, -1), "green-magenta": (-1, 2, -1)}  # of red, green and blue
_OCTAVES = 4  # of the oriented bands: from 1/2 cycle per pixel and above down to 1/32
_ANGLES = 4
_COARSE = 4  # bands below: three octaves, and the rest down to the mean
_MARGIN = 64  # pixels of reflection around the picture: products of spectra wrap around its borders
_SMALLEST = 32  # pixels of a side
CHANNELS = len(_AXES) * (_OCTAVES * _ANGLES + _COARSE)
SCALE_GROUPS = len(_AXES) * (_OCTAVES + 1)  # groups that are the filters of one scale


def check_picture(picture: Array, name: str = "picture") -> Array:
    """The picture as float32; ShapeError unless it is (H, W, 3) and not too small, OptionError unless from 0 to 1."""
    array = np.asarray(picture)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ShapeError(f"{name} must have the shape (height, width, 3): got {array.shape}; give red, green and blue")
    if min(array.shape[:2]) < _SMALLEST:
        raise ShapeError(f"{name} must be at least {_SMALLEST} pixels high and wide: got {array.shape[0]} by "
                         f"{array.shape[1]}; give a larger one")  # fmt: skip
    if array.dtype.kind != "f" or not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise OptionError(f"{name} must be floats between 0 and 1: got {array.dtype} from {array.min()} to "
                          f"{array.max()}; divide bytes by 255")  # fmt: skip
    return array.astype(np.float32)


def _along(axis: tuple[int, ...], picture: Array) -> Array:
    """The part of a picture along an axis of colours; exactly 0 for grey, where a matrix product leaves roundings."""
    total = sum(weight * picture[..., colour] for colour, weight in enumerate(axis))
    return total / sqrt(sum(weight**2 for weight in axis))


def split(picture: Array) -> Array:
    """(1, 60, H, W) float32: the maps of a picture (H, W, 3) of floats; `subband_names` says what each one is.

    Raises ShapeError and OptionError for what is no picture. Takes about 0.5 s for a picture of 600 by 512.
    """
    picture = check_picture(picture)
    height, width, _ = picture.shape
    pad = [(min(_MARGIN, size - 1),) * 2 for size in (height, width)]
    padded = np.pad(np.stack([_along(axis, picture) for axis in _AXES.values()], 2), (*pad, (0, 0)), "reflect")
    size = padded.shape[:2]
    rows, columns = slice(pad[0][0], pad[0][0] + height), slice(pad[1][0], pad[1][0] + width)
    spectra = [np.fft.rfft2(padded[..., axis]) for axis in range(len(_AXES))]
    maps = np.empty((1, CHANNELS, height, width), np.float32)
    each = CHANNELS // len(_AXES)

    def fill(band: tuple[int, Array]) -> None:
        i, transfer = band
        for axis, spectrum in enumerate(spectra):
            maps[0, axis * each + i] = np.fft.irfft2(spectrum * transfer, size)[rows, columns]

    with ThreadPoolExecutor(2) as pool:  # transforms let go of the interpreter's lock
        list(pool.map(fill, enumerate(_filters(*size))))
    return maps


def join(maps: Array) -> Array:
    """The picture (H, W, 3), float32, whose maps these are: the inverse of `split`, up to rounding.

    maps: (1, 60, H, W). After the maps were changed, values may lie outside 0 to 1; nothing is cut off here.
    """
    maps = np.asarray(maps)
    if maps.ndim != 4 or maps.shape[:2] != (1, CHANNELS):
        raise ShapeError(f"maps must have the shape (1, {CHANNELS}, H, W): got {maps.shape}; make them with split")
    axes = maps[0].reshape(len(_AXES), -1, *maps.shape[2:]).sum(1, dtype=np.float64)
    units = np.array(list(_AXES.values()), np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    mixed: Array = np.moveaxis(axes, 0, -1) @ units
    return mixed.astype(np.float32)


def subband_names() -> list[str]:
    """What each channel holds, in order: axis, cycles per pixel, and the direction in which it varies."""
    bands = [f"1/{4 << k} to 1/{2 << k} cycle, {180 * a // _ANGLES}°" for k in range(_OCTAVES) for a in range(_ANGLES)]
    bands += [f"1/{4 << k} to 1/{2 << k} cycle" for k in range(_OCTAVES, _OCTAVES + _COARSE - 1)] + ["below"]
    return [f"{axis}, {band}" for axis in _AXES for band in bands]


def _filters(height: int, width: int) -> Iterator[Array]:
    """The transfer functions of one colour axis; they sum to 1 at every frequency."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    radius, angle = np.hypot(fy, fx), np.arctan2(fy, fx)
    total = _ANGLES * comb(2 * _ANGLES - 2, _ANGLES - 1) / 4 ** (_ANGLES - 1)  # of the windows, at every angle
    windows = [np.cos(angle - np.pi * a / _ANGLES) ** (2 * _ANGLES - 2) / total for a in range(_ANGLES)]
    above: Array = np.ones_like(radius)
    for octave in range(_OCTAVES + _COARSE - 1):
        below = _lowpass(radius, 0.25 / 2**octave)
        if octave < _OCTAVES:
            yield from ((above - below) * window for window in windows)
        else:
            yield above - below
        above = below
    yield above


def _lowpass(radius: Array, cutoff: float) -> Array:
    """1 up to half an octave below the cutoff, 0 from half an octave above it, a raised cosine between."""
    octaves = np.log2(np.maximum(radius, 1e-9) / cutoff)
    return np.cos(np.pi / 2 * np.clip(octaves + 0.5, 0, 1)) ** 2
