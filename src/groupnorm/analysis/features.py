"""Real feature maps from a photograph: the filters that the first layer of a trained network and an eye have in common.

Forty-eight channels: on each of three colour axes (luminance, red against green, blue against yellow) and at two
scales, six oriented Gabor filters, one difference of Gaussians, and one Gaussian. Both scales of a filter stand side
by side, and make a group of two channels. The Gaussians keep the mean of the picture; so groups differ in mean and in
spread by orders of magnitude, as those of real networks do, which is what normalisation is for.

Sources: Daugman 1985 for Gabor filters, Marr and Hildreth 1980 for the difference of Gaussians, Ruderman
et al. 1998 for the colour axes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from groupnorm.errors import FileError

__all__ = ["CHANNELS", "channel_names", "crops", "feature_maps", "filtered", "photograph", "stand_in"]

Array = Any

_AXES = {"luminance": (0.299, 0.587, 0.114), "red-green": (0.5, -0.5, 0.0), "blue-yellow": (-0.25, -0.25, 0.5)}
_SIGMAS = (1.5, 3.5)  # pixels
_ANGLES = 6
_MARGIN = 20  # pixels of reflection around the picture: products of spectra wrap around its borders
CHANNELS = len(_AXES) * len(_SIGMAS) * (_ANGLES + 2)


def photograph() -> Array:
    """(height, width, 3) float32 between 0 and 1: the portrait of Grace Hopper that matplotlib ships.

    Raises FileError if matplotlib, or the picture in it, is missing.
    """
    try:
        from matplotlib import get_data_path, image
    except ImportError as error:
        raise FileError(
            "the photograph comes with matplotlib, which is not installed: pip install matplotlib"
        ) from error
    path = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not path.is_file():
        raise FileError(f"the photograph is missing: {path}; reinstall matplotlib with its sample data")
    return np.asarray(image.imread(path), np.float32)[..., :3] / 255


def stand_in(height: int = 600, width: int = 512) -> Array:
    """A picture for a machine without matplotlib: 1/f noise, whose spectrum photographs share."""
    noise = np.fft.rfft2(np.random.default_rng(0).standard_normal((3, height, width)))
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    picture = np.fft.irfft2(noise / (np.hypot(fx, fy) + 2 / height), (height, width))
    low, high = picture.min((1, 2), keepdims=True), picture.max((1, 2), keepdims=True)
    return np.moveaxis((picture - low) / (high - low), 0, 2).astype(np.float32)


def crops(picture: Array, side: int) -> Array:
    """(4, side, side, ...): the four corners of an array (height, width, ...), which overlap where it is small."""
    ends = (slice(None, side), slice(-side, None))
    return np.stack([picture[rows, columns] for rows in ends for columns in ends])


def feature_maps(picture: Array, side: int) -> Array:
    """(4, 48, side, side) float32: every filter on its colour axis of the whole picture, then the corners."""
    maps = np.empty((4, CHANNELS, side, side), np.float32)
    for i, whole in enumerate(_responses(picture)):
        maps[:, i] = crops(whole, side)
    return maps


def filtered(picture: Array, side: int) -> Array:
    """(N, 48, side, side) float32: the same filters, then every square of that side, row by row, without overlap.

    There are N = (height // side) * (width // side) of them.
    """
    rows, columns = (size // side for size in picture.shape[:2])
    maps = np.empty((rows * columns, CHANNELS, side, side), np.float32)
    for i, whole in enumerate(_responses(picture)):
        squares = whole[: rows * side, : columns * side].reshape(rows, side, columns, side)
        maps[:, i] = squares.swapaxes(1, 2).reshape(-1, side, side)
    return maps


def _responses(picture: Array) -> Iterator[Array]:
    """Every filter's map of the whole picture, (height, width), in the order of `channel_names`."""
    height, width, _ = picture.shape
    padded = np.pad(picture, ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)), "reflect")
    size = padded.shape[:2]
    spectra = {axis: np.fft.rfft2(padded @ np.array(mix, np.float32)) for axis, mix in _AXES.items()}
    for axis, transfer in _bank(*size):
        whole = np.fft.irfft2(spectra[axis] * transfer, size)
        yield whole[_MARGIN : _MARGIN + height, _MARGIN : _MARGIN + width]


def channel_names() -> list[str]:
    """What each channel responds to, in order; neighbours 2i and 2i + 1 are one filter at both scales."""
    kinds = [f"{180 * a // _ANGLES}°" for a in range(_ANGLES)] + ["spot", "blur"]
    return [f"{axis}, {kind}, {sigma} px" for axis in _AXES for kind in kinds for sigma in _SIGMAS]


def _bank(height: int, width: int) -> Iterator[tuple[str, Array]]:
    """Colour axis and transfer function of each filter, in the order of `channel_names`."""
    f = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    for axis in _AXES:
        for angle in range(_ANGLES):
            for sigma in _SIGMAS:
                yield axis, _gabor(*f, sigma, np.pi * angle / _ANGLES)
        for sigma in _SIGMAS:
            gauss = _gauss(*f, sigma)
            yield axis, gauss - gauss**2.56  # a Gaussian of 1.6 times the width has this spectrum
        for sigma in _SIGMAS:
            yield axis, _gauss(*f, sigma)


def _gauss(fy: Array, fx: Array, sigma: float) -> Array:
    return np.exp(-2 * (np.pi * sigma) ** 2 * (fx**2 + fy**2))


def _gabor(fy: Array, fx: Array, sigma: float, angle: float) -> Array:
    """An edge detector: two bumps of opposite sign in the spectrum; its wavelength is about four sigma."""
    spread = 1 / (2 * np.pi * sigma)
    u, v = 1.5 * spread * np.cos(angle), 1.5 * spread * np.sin(angle)
    bumps = [np.exp(-2 * ((fx - s * u) ** 2 + (fy - s * v) ** 2) / spread**2) for s in (1, -1)]
    odd: Array = 1j * (bumps[0] - bumps[1])
    odd[0, 0] = 0  # it does not see the mean
    return odd
