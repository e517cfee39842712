"""What was published about Group Normalization, as data, each number with its source.

Errors are in percent, APs as COCO counts them, memory in gigabytes, times in seconds. Group counts are in
`groupnorm._core.group_counts`, because conversions need them too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from groupnorm._core.group_counts import ERROR_BY_CHANNELS_PER_GROUP, ERROR_BY_GROUPS

__all__ = [
    "CONFIGURATIONS",
    "DETECTION",
    "DETECTRON_COSTS",
    "ERROR_BY_BATCH",
    "ERROR_BY_CHANNELS_PER_GROUP",
    "ERROR_BY_GROUPS",
    "ERROR_BY_NORM",
    "REPRODUCED_ERRORS",
    "SOURCES",
    "VIDEO",
    "Configuration",
    "Cost",
    "DetectionResult",
    "Source",
    "VideoResult",
]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a number was published: whose work, the place inside, the arXiv number and title if it is a paper, and
    what was measured. str(source) is the short form that stands behind a number.
    """

    work: str
    place: str = ""
    arxiv: str | None = None
    title: str = ""
    measured: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.work, self.arxiv and f"arXiv {self.arxiv}", self.place)))


@dataclass(frozen=True, slots=True)
class Configuration:
    """The group count that a published network or tool of a task uses: `groups(channels)`; `rule` says it in words."""

    rule: str
    groups: Callable[[int], int]
    source: Source


@dataclass(frozen=True, slots=True)
class DetectionResult:
    """Mask R-CNN on COCO: box AP and mask AP. `norm` is "frozen BN" (BN* in the paper) or "GN"."""

    backbone: str
    norm: str
    schedule: str
    box_ap: float
    mask_ap: float
    source: Source


@dataclass(frozen=True, slots=True)
class VideoResult:
    """I3D with ResNet-50 on Kinetics: accuracies in percent for clips of `frames`, `batch` clips to a GPU."""

    norm: str
    frames: int
    batch: int
    top1: float
    top5: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What one network costs with one norm: memory of a GPU in training, and seconds of an iteration and of an image in
    the network (about 0.017 s more go into what comes after it).
    """

    network: str
    norm: str
    memory_gb: float
    iteration_s: float
    inference_s: float


def _paper(place: str, measured: str = "") -> Source:
    return Source("Wu and He 2018", place, "1803.08494", "Group Normalization", measured)


_DETECTRON = Source("Detectron, projects/GN/README.md")
_RESNET = "ResNet-50 on ImageNet, 8 GPUs"

SOURCES = {
    "norms": _paper("table 1", f"{_RESNET}, 32 images per GPU"),
    "batch": _paper("table 2", _RESNET),
    "groups": _paper("table 3, top", f"{_RESNET}, 32 images per GPU"),
    "channels_per_group": _paper("table 3, bottom", f"{_RESNET}, 32 images per GPU"),
    "video": _paper("table 8", "I3D with ResNet-50 on Kinetics"),
    "recipe": _paper("section 4.1"),
    "frozen": _paper("section 4.2"),
    "reproduced": Source("GroupNorm-reproduce (ppwwyyxx)", measured="three runs of the ResNet-50 with 32 groups"),
    "cost": _DETECTRON,
    "noise": Source("standard errors of M independent normal values"),
}

# Validation error of ResNet-50 on ImageNet, in percent.
ERROR_BY_NORM = {"BN": 23.6, "LN": 25.3, "IN": 28.4, "GN": 24.1}  # 32 images per GPU; GN with 32 groups
ERROR_BY_BATCH = {  # norm -> images per GPU -> error
    "BN": {32: 23.6, 16: 23.7, 8: 24.8, 4: 27.3, 2: 34.7},
    "GN": {32: 24.1, 16: 24.2, 8: 24.0, 4: 24.2, 2: 24.1},
}
REPRODUCED_ERRORS = (24.0, 24.0, 24.1)  # how far runs of one network lie apart

_FPN, _C4 = _paper("table 6"), _paper("table 4")
DETECTION = (
    DetectionResult("R50-C4", "frozen BN", "", 37.7, 32.8, _C4),
    DetectionResult("R50-C4", "GN", "", 38.8, 33.6, _C4),
    DetectionResult("R50-FPN", "frozen BN", "2x", 38.6, 34.5, _FPN),
    DetectionResult("R50-FPN", "GN", "2x", 40.3, 35.7, _FPN),
    DetectionResult("R50-FPN", "GN", "3x", 40.8, 36.1, _FPN),
    DetectionResult("R101-FPN", "frozen BN", "2x", 40.9, 36.4, _FPN),
    DetectionResult("R101-FPN", "GN", "2x", 41.8, 36.8, _FPN),
    DetectionResult("R101-FPN", "GN", "3x", 42.3, 37.2, _FPN),
)

VIDEO = (
    VideoResult("BN", 32, 8, 73.3, 90.7),
    VideoResult("BN", 32, 4, 72.1, 90.0),
    VideoResult("BN", 64, 4, 73.3, 90.8),
    VideoResult("GN", 32, 8, 73.0, 90.6),
    VideoResult("GN", 32, 4, 72.8, 90.6),
    VideoResult("GN", 64, 4, 74.5, 91.7),
)

DETECTRON_COSTS = (
    Cost("Mask R-CNN R50-FPN", "frozen BN", 8.6, 0.897, 0.099),
    Cost("Mask R-CNN R50-FPN", "GN", 10.5, 1.017, 0.146),
    Cost("Mask R-CNN R101-FPN", "frozen BN", 10.2, 0.993, 0.126),
    Cost("Mask R-CNN R101-FPN", "GN", 12.4, 1.151, 0.180),
)
DETECTRON_HEADS = "GN's with a box head of 4 convolutions, and norms in FPN and heads"  # what else is different
FROZEN_BN_SAME_HEAD = (38.8, 34.4)  # box and mask AP of R50-FPN with frozen BN and that box head

_THIRTY_TWO = _paper("section 3: 32 groups by default")

_DIFFUSION = Source("Stable Diffusion 1.5 and XL, unet/config.json", "norm_num_groups")
_MEDICAL = Source(
    "Myronenko 2018", arxiv="1810.11654", title="3D MRI brain tumor segmentation using autoencoder regularization"
)
_OPACUS = Source("Opacus, its replacement of BatchNorm")
_STYLE = Source(
    "Ulyanov, Vedaldi and Lempitsky 2016", arxiv="1607.08022",
    title="Instance Normalization: The Missing Ingredient for Fast Stylization",
)  # fmt: skip

CONFIGURATIONS = {  # by task
    "classification": Configuration("32 groups", lambda channels: 32, _THIRTY_TWO),
    "detection": Configuration("32 groups", lambda channels: 32, _DETECTRON),
    "segmentation": Configuration("32 groups", lambda channels: 32, _DETECTRON),
    "diffusion": Configuration("32 groups everywhere", lambda channels: 32, _DIFFUSION),
    "video": Configuration("32 groups", lambda channels: 32, _THIRTY_TWO),
    "medical": Configuration("8 groups", lambda channels: 8, _MEDICAL),
    "dp-sgd": Configuration("gcd(32, C) groups", lambda channels: math.gcd(32, channels), _OPACUS),
    "style": Configuration("one channel per group", lambda channels: channels, _STYLE),
}
