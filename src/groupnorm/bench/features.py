"""Real feature maps from a photograph: the filters that the first layer of a trained network and an eye have in common.

Forty-eight channels: for each of three colour axes (luminance, red against green, blue against yellow) and two
scales, six oriented Gabor filters, one difference of Gaussians, and one Gaussian. The last keeps the mean of the
picture, as channels of real networks do; so the groups differ in mean and in spread by orders of magnitude, which is
what normalisation is for. Sources: Daugman 1985 for Gabor filters, Marr and Hildreth 1980 for the difference of
Gaussians, Ruderman et al. 1998 for the axes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from groupnorm.errors import FileError

__all__ = ["CHANNELS", "channel_names", "crops", "feature_maps", "photograph"]

Array = Any

_AXES = {"luminance": (0.299, 0.587, 0.114), "red-green": (0.5, -0.5, 0.0), "blue-yellow": (-0.25, -0.25, 0.5)}
_SIGMAS = (1.5, 3.5)  # pixels
_ANGLES = 6
CHANNELS = len(_AXES) * len(_SIGMAS) * (_ANGLES + 2)


def photograph() -> Array:
    """(height, width, 3) float32 between 0 and 1: the portrait of Grace Hopper that matplotlib ships.

    Raises FileError if matplotlib, or the picture in it, is missing.
    """
    try:
        from matplotlib import get_data_path, image
    except ImportError as error:
        raise FileError(
            "the photograph comes with matplotlib, which is not installed: pip install 'groupnorm[plots]'"
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


def crops(picture: Array, side: int = 256) -> Array:
    """(4, side, side, 3): the four corners, which overlap where the picture is small."""
    top, left = (slice(0, side), slice(0, side)), (slice(-side, None), slice(-side, None))
    return np.stack([picture[rows, columns] for rows in (top[0], left[0]) for columns in (top[1], left[1])])


def feature_maps(pictures: Array) -> Array:
    """(N, 48, side, side) float32 from (N, side, side, 3): every filter on its colour axis, by products of spectra."""
    n, height, width, _ = pictures.shape
    maps = np.empty((n, CHANNELS, height, width), np.float32)
    spectra = {axis: np.fft.rfft2(pictures @ np.array(mix, np.float32)) for axis, mix in _AXES.items()}
    for i, (axis, transfer) in enumerate(_bank(height, width)):
        maps[:, i] = np.fft.irfft2(spectra[axis] * transfer, (height, width))
    return maps


def channel_names() -> list[str]:
    """What each channel responds to, in order."""
    kinds = [f"{180 * a // _ANGLES}°" for a in range(_ANGLES)] + ["spot", "blur"]
    return [f"{axis}, {kind}, {sigma} px" for axis in _AXES for sigma in _SIGMAS for kind in kinds]


def _bank(height: int, width: int) -> Any:
    """Colour axis and transfer function of each filter. A Gabor filter is a pair of Gaussian bumps in the spectrum."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    for axis in _AXES:
        for sigma in _SIGMAS:
            spread = 1 / (2 * np.pi * sigma)
            gauss = np.exp(-(fx**2 + fy**2) / (2 * spread**2))
            centre = 1.5 * spread  # a wavelength of about four sigma: one and a half waves under the envelope
            for a in range(_ANGLES):
                u, v = centre * np.cos(np.pi * a / _ANGLES), centre * np.sin(np.pi * a / _ANGLES)
                bumps = [np.exp(-((fx - s * u) ** 2 + (fy - s * v) ** 2) / (2 * (spread / 2) ** 2)) for s in (1, -1)]
                odd = 1j * (bumps[0] - bumps[1])  # an edge detector: it has no mean
                odd[0, 0] = 0
                yield axis, odd
            yield axis, gauss - gauss**2.56  # a Gaussian of 1.6 times the width has this spectrum
            yield axis, gauss
