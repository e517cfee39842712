"""Pictures as arrays: from files of the user, or made of what matplotlib ships."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from groupnorm.errors import FileError, ShapeError

__all__ = ["read_picture", "reduced", "terrain"]

Array = Any

_INSTALL = "reading and drawing pictures needs matplotlib, which is not installed: pip install matplotlib"


def read_picture(path: str | os.PathLike[str]) -> Array:
    """(height, width, 3) float32 between 0 and 1: a picture in any format that matplotlib reads (PNG, JPEG, ...).

    Grey becomes three equal channels; what is transparent is laid on white. Raises FileError for a file that is not
    there, or is no picture, and where matplotlib is missing.
    """
    try:
        from matplotlib import image
        from PIL import Image
    except ImportError as error:
        raise FileError(_INSTALL) from error
    try:
        # open, not matplotlib, says what is wrong with a path; of a picture that is too large to be true it warns, too
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            opened = Image.open(file)
            mode, format_ = opened.mode, opened.format
            file.seek(0)
            raw = np.asarray(image.imread(file, format="any"))
    except Exception as error:  # each decoder has errors of its own: SyntaxError, ValueError, struct.error, ...
        if isinstance(error, OSError) and error.errno is not None:
            raise FileError(f"{os.fspath(path)}: cannot be read ({error.strerror}); give a picture file") from error
        raise FileError(f"{os.fspath(path)}: is no picture that can be read ({error}); "
                        "give a PNG or JPEG file") from error  # fmt: skip
    if mode[0] in "IF" and format_ != "PNG":
        raise FileError(f"{os.fspath(path)}: its values are wider than a byte (mode {mode}), and would be cut off at "
                        "255; give a PNG or JPEG file")  # fmt: skip
    picture = raw.astype(np.float32) / (np.iinfo(raw.dtype).max if raw.dtype.kind == "u" else 1)
    if picture.ndim == 2:
        picture = picture[..., None]
    if picture.shape[2] in (2, 4):
        alpha = picture[..., -1:]
        picture = picture[..., :-1] * alpha + (1 - alpha)
    return np.clip(np.broadcast_to(picture, (*picture.shape[:2], 3)), 0, 1)


def reduced(picture: Array, longest: int) -> Array:
    """The picture with no side longer than `longest`: means of squares of pixels, whose side is a whole number."""
    factor = -(-max(picture.shape[:2]) // longest)
    if factor <= 1:
        return picture
    height, width = (size // factor for size in picture.shape[:2])
    if min(height, width) < 1:
        raise ShapeError(f"a picture of {picture.shape[1]} by {picture.shape[0]} pixels is too narrow: reduced to "
                         f"{longest}, nothing of its shorter side is left")  # fmt: skip
    squares = picture[: height * factor, : width * factor].reshape(height, factor, width, factor, -1)
    return squares.mean((1, 3), dtype=np.float32)


def terrain() -> Array:
    """(344, 403, 3) float32: mountains at the Jacksboro fault, the elevations that matplotlib ships, lit from the
    north-west in copper. Raises FileError if matplotlib, or the data in it, is missing.
    """
    try:
        from matplotlib import colormaps, get_data_path
        from matplotlib.colors import LightSource
    except ImportError as error:
        raise FileError(_INSTALL) from error
    path = Path(get_data_path()) / "sample_data" / "jacksboro_fault_dem.npz"
    if not path.is_file():
        raise FileError(f"the elevation map is missing: {path}; reinstall matplotlib with its sample data")
    with np.load(path) as data:
        elevation, dx, dy, south = (data[name] for name in ("elevation", "dx", "dy", "ymin"))
    metres = 111_200  # of a degree of latitude
    light = LightSource(azdeg=315, altdeg=45)
    shaded = light.shade(
        elevation, cmap=colormaps["copper"], blend_mode="overlay", vert_exag=3, dy=metres * float(dy),
        dx=metres * float(dx) * np.cos(np.radians(float(south))),
    )  # fmt: skip
    return np.clip(shaded[..., :3], 0, 1).astype(np.float32)
