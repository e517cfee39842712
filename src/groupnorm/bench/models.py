"""Which real models are measured, stock against converted: a table, as cases.py is one of shapes.

Weights are random and nothing is downloaded. A model comes in sizes: "full", as it is used; "half", with half the
channels, where training the full one needs more memory than a small machine has; "tiny", for tests and a first look.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import util
from typing import Any

from groupnorm.errors import OptionError

__all__ = ["MODELS", "MODES", "ModelCase", "missing", "select_models"]

Module = Any
Tensor = Any

MODES = ("inference", "training", "dp-sgd")  # forward; forward and backward; a step of Opacus


@dataclass(frozen=True, slots=True, eq=False)
class ModelCase:
    """One model, and what is run of it.

    build(size): a torch.nn.Module that takes inputs(size) and gives one tensor. sizes: the modes to be measured, with
    a size for each. needs: modules that must be installed beside torch. compiled: whether torch.compile is
    measured, too, where it is asked for. repeats: the least number of samples. headline: part of the short table.
    """

    name: str
    title: str
    source: str
    build: Callable[[str], Module]
    inputs: Callable[[str], tuple[Tensor, ...]]
    sizes: dict[str, str] = field(default_factory=lambda: {"inference": "full", "training": "full"})
    needs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    compiled: bool = True
    repeats: int = 5
    headline: bool = False


def missing(case: ModelCase) -> str | None:
    """None if the model can be built here, else the module that is not installed."""
    return next((module for module in ("torch", *case.needs) if util.find_spec(module) is None), None)


def select_models(names: str | None) -> tuple[ModelCase, ...]:
    """The models whose name is, or begins with, one of the comma-separated names; all for None.

    Raises OptionError for a name that fits no model.
    """
    if names is None:
        return MODELS
    chosen: dict[str, ModelCase] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        fitting = [case for case in MODELS if case.name == name] or [
            case for case in MODELS if case.name.startswith(name)
        ]
        if not fitting:
            raise OptionError(f"models must be among {', '.join(case.name for case in MODELS)}: got {name!r}")
        chosen |= {case.name: case for case in fitting}
    return tuple(chosen.values())


def _noise(*shape: int) -> Tensor:
    import torch

    return torch.randn(shape)


# ---- Stable Diffusion ------------------------------------------------------------------------------------------------


def _unet(size: str) -> Module:
    from diffusers import UNet2DConditionModel

    from groupnorm.bench.networks import FirstOutput

    if size == "tiny":
        return FirstOutput(UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
            attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ))  # fmt: skip
    channels = (320, 640, 1280, 1280) if size == "full" else (160, 320, 640, 640)
    return FirstOutput(UNet2DConditionModel(
        sample_size=64, block_out_channels=channels, layers_per_block=2, cross_attention_dim=768, attention_head_dim=8,
    ))  # fmt: skip


def _unet_inputs(size: str) -> tuple[Tensor, ...]:
    import torch

    side, width = (16, 32) if size == "tiny" else (32, 768)
    return _noise(1, 4, side, side), torch.tensor([500]), _noise(1, 77, width)


def _vae(size: str) -> Module:
    from diffusers import AutoencoderKL

    channels, layers = ((32, 64), 1) if size == "tiny" else ((128, 256, 512, 512), 2)
    return AutoencoderKL(
        block_out_channels=channels, layers_per_block=layers, latent_channels=4, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
    )  # fmt: skip


def _decoder(size: str) -> Module:
    from torch import nn

    vae = _vae(size)
    return nn.Sequential(vae.post_quant_conv, vae.decoder)


def _encoder(size: str) -> Module:
    from torch import nn

    vae = _vae(size)
    return nn.Sequential(vae.encoder, vae.quant_conv)


# ---- 3-D segmentation ------------------------------------------------------------------------------------------------


def _segresnet(size: str) -> Module:
    from monai.networks.nets import SegResNet

    blocks: dict[str, Any] = {"blocks_down": (1, 1), "blocks_up": (1,)} if size == "tiny" else {}
    return SegResNet(spatial_dims=3, init_filters=8 if size == "tiny" else 16, in_channels=1, out_channels=2,
                     norm=("GROUP", {"num_groups": 8}), **blocks)  # fmt: skip


def _monai_unet(size: str) -> Module:
    from monai.networks.nets import UNet

    channels = (8, 16) if size == "tiny" else (16, 32, 64, 128, 256)
    return UNet(spatial_dims=3, in_channels=1, out_channels=8, channels=channels, strides=(2,) * (len(channels) - 1),
                num_res_units=2, norm=("GROUP", {"num_groups": 8}))  # fmt: skip


def _volume(size: str) -> tuple[Tensor, ...]:
    return (_noise(1, 1, *[16 if size == "tiny" else 96] * 3),)


# ---- classification --------------------------------------------------------------------------------------------------


def _resnet50(size: str) -> Module:
    from groupnorm.bench.networks import resnet50

    return resnet50(32, (1, 1), 10) if size == "tiny" else resnet50()


def _private_cnn(size: str) -> Module:
    from groupnorm.bench.networks import private_cnn

    return private_cnn(16 if size == "tiny" else 64)


# ---- the table -------------------------------------------------------------------------------------------------------

_DIFFUSION = "Stable Diffusion 1.5, unet/config.json, in diffusers"
_KL = "AutoencoderKL of Stable Diffusion, vae/config.json, in diffusers"

MODELS: tuple[ModelCase, ...] = (
    ModelCase("unet-sd15", "UNet of Stable Diffusion 1.5, one 256x256 image (32x32 latent)", _DIFFUSION, _unet,
              _unet_inputs, {"inference": "full", "training": "half"}, ("diffusers",), repeats=3, headline=True),
    ModelCase("vae-decode-256", "VAE decoder, one 256x256 image", _KL, _decoder,
              lambda size: (_noise(1, 4, *[8 if size == "tiny" else 32] * 2),), needs=("diffusers",), repeats=3,
              headline=True),
    ModelCase("vae-decode-512", "VAE decoder, one 512x512 image", _KL, _decoder,
              lambda size: (_noise(1, 4, *[8 if size == "tiny" else 64] * 2),), {"inference": "full"}, ("diffusers",),
              repeats=3),
    ModelCase("vae-encode-256", "VAE encoder, one 256x256 image", _KL, _encoder,
              lambda size: (_noise(1, 3, *[16 if size == "tiny" else 256] * 2),), needs=("diffusers",), repeats=3),
    ModelCase("segresnet", "SegResNet, one 96^3 volume, 16 filters, G = 8, ReLU",
              "Myronenko 2018, in MONAI with its defaults", _segresnet, _volume, needs=("monai",),
              repeats=3, headline=True),
    ModelCase("monai-unet", "3-D UNet, one 96^3 volume, channels 16 to 256, 2 residual units, G = 8, PReLU",
              "MONAI's UNet as in its spleen tutorial, GroupNorm for BatchNorm, 8 classes", _monai_unet, _volume,
              needs=("monai",), repeats=3, headline=True),
    ModelCase("resnet50-gn", "ResNet-50 v1.5 with GroupNorm(32), 8 images of 224x224",
              "He et al. 2016, Wu and He 2018; bench/networks.py", _resnet50,
              lambda size: (_noise(2, 3, 32, 32) if size == "tiny" else _noise(8, 3, 224, 224),), headline=True),
    ModelCase("dp-sgd", "A step of DP-SGD: CNN with six GroupNorm(16) and ReLU, 16 images of 32x32",
              "Opacus (GradSampleModule, DPOptimizer); bench/networks.py", _private_cnn,
              lambda size: (_noise(4, 3, 16, 16) if size == "tiny" else _noise(16, 3, 32, 32),), {"dp-sgd": "full"},
              ("opacus",), ("float32",), compiled=False, headline=True),  # Opacus works in hooks, outside of any graph
)  # fmt: skip
