"""What is measured: shapes that real networks give to Group Normalization, each with its source.

Shapes are written channels first, (N, C, *spatial), whatever layout is measured. No tensor is larger than 140 MB in
float32, so that a whole run fits in a few gigabytes.
"""

from dataclasses import dataclass
from math import prod

from groupnorm.errors import OptionError

__all__ = ["CASES", "Case", "select"]


@dataclass(frozen=True, slots=True)
class Case:
    """One shape that a network gives to the operator.

    `activation` is what the network applies right after. `quick`: part of `groupnorm bench --quick`. `headline`: part
    of the short tables.
    """

    name: str
    shape: tuple[int, ...]
    num_groups: int
    source: str
    activation: str | None = None
    eps: float = 1e-5
    quick: bool = False
    headline: bool = False

    @property
    def elements(self) -> int:
        """How many numbers x holds."""
        return prod(self.shape)

    @property
    def size(self) -> str:
        """The shape as it is printed: 2x320x64x64."""
        return "x".join(map(str, self.shape))


_RESNET = "ResNet-50 of He et al. 2016, table 1, with the G = 32 and 32 images per GPU of Wu and He 2018, section 4.1"
_SD15 = "Stable Diffusion 1.5, unet/config.json: block_out_channels 320, 640, 1280, 1280; batch 2 for guidance"
_SDXL = "Stable Diffusion XL base 1.0, unet/config.json: block_out_channels 320, 640, 1280; batch 2 for guidance"
_VAE = "AutoencoderKL of Stable Diffusion, vae/config.json: block_out_channels 128, 256, 512, 512; one 512x512 image"
_FPN = "Mask R-CNN with FPN and GroupNorm, Detectron projects/GN: 256 channels, 2 images padded to 800x1344"
_MEDICAL = (
    "Myronenko 2018, 3D MRI brain tumor segmentation: 32 filters at full size, G = 8; 96^3 crops as in MONAI's examples"
)
_CAFFE2 = "the size class of Caffe2's own measurements (pytorch pull requests 12844, 17945), smaller batch"


def _resnet(stage: str, channels: int, side: int, *, quick: bool = False, headline: bool = False) -> Case:
    return Case(f"resnet50-{stage}", (32, channels, side, side), 32, _RESNET, "relu", quick=quick, headline=headline)


def _unet(name: str, source: str, channels: int, side: int, *, quick: bool = False, headline: bool = False) -> Case:
    return Case(name, (2, channels, side, side), 32, source, "silu", quick=quick, headline=headline)


def _vae(name: str, channels: int, side: int, *, quick: bool = False, headline: bool = False) -> Case:
    shape = (1, channels, side, side)
    return Case(f"vae-{name}", shape, 32, _VAE, "silu", eps=1e-6, quick=quick, headline=headline)


CASES: tuple[Case, ...] = (
    _resnet("conv1", 64, 112),
    _resnet("conv2", 256, 56, headline=True),
    _resnet("conv3", 512, 28),
    _resnet("conv4", 1024, 14, headline=True),
    _resnet("conv5", 2048, 7),
    _unet("sd15-64", _SD15, 320, 64, quick=True, headline=True),
    _unet("sd15-64-skip", _SD15 + "; 640 + 320 after the skip", 960, 64),
    _unet("sd15-32", _SD15, 640, 32),
    _unet("sd15-16", _SD15, 1280, 16),
    _unet("sd15-8", _SD15, 1280, 8, quick=True, headline=True),
    _unet("sdxl-128", _SDXL, 320, 128, headline=True),
    _unet("sdxl-128-skip", _SDXL + "; 640 + 320 after the skip", 960, 128),
    _unet("sdxl-64", _SDXL, 640, 64),
    _unet("sdxl-32", _SDXL, 1280, 32, headline=True),
    _vae("512", 128, 512, headline=True),
    _vae("256", 256, 256),
    _vae("256-up", 512, 256),
    _vae("128", 512, 128),
    _vae("64", 512, 64, quick=True),
    Case("fpn-p2", (2, 256, 200, 336), 32, _FPN),
    Case("fpn-p3", (2, 256, 100, 168), 32, _FPN, headline=True),
    Case("fpn-p4", (2, 256, 50, 84), 32, _FPN),
    Case("fpn-p5", (2, 256, 25, 42), 32, _FPN),
    Case("box-head", (512, 256, 7, 7), 32, _FPN + "; 4conv1fc head on 512 regions of one image", "relu"),
    Case("mask-head", (128, 256, 14, 14), 32, _FPN + "; mask head on 128 positive regions of one image", "relu"),
    Case("medical-96", (1, 32, 96, 96, 96), 8, _MEDICAL, "relu", headline=True),
    Case("medical-48", (1, 64, 48, 48, 48), 8, _MEDICAL, "relu"),
    Case("medical-24", (1, 128, 24, 24, 24), 8, _MEDICAL, "relu", quick=True),
    Case("video-8", (1, 512, 8, 45, 80), 32, "LTX-2 latent upsampler, as measured in sglang pull request 26045", "silu",
         headline=True),
    Case("video-1", (1, 128, 1, 256, 256), 32, "HunyuanVideo VAE, as in sglang pull request 24741", "silu", 1e-6),
    Case("caffe2-64", (32, 128, 64, 64), 32, _CAFFE2),
    Case("tiny-64", (1, 64, 8, 8), 32, "16 KB: what a call costs, not what memory costs", quick=True, headline=True),
    Case("tiny-32", (2, 32, 4, 4), 8, "4 KB: what a call costs, not what memory costs", quick=True),
)  # fmt: skip


def select(names: str | None, *, quick: bool = False) -> tuple[Case, ...]:
    """The cases whose name is, or begins with, one of the comma-separated names; for None all, or all quick ones.

    Raises OptionError for a name that fits no case.
    """
    if names is None:
        return tuple(case for case in CASES if case.quick or not quick)
    chosen: dict[str, Case] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        fitting = [case for case in CASES if case.name == name] or [
            case for case in CASES if case.name.startswith(name)
        ]
        if not fitting:
            raise OptionError(f"cases must be among {', '.join(case.name for case in CASES)}: got {name!r}")
        chosen |= {case.name: case for case in fitting}
    return tuple(chosen.values())
