"""Real models with random weights, as their libraries build them.

Nothing is downloaded. `quick` builds a model of the same kind that is small in every way, for tests and for warming up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from groupnorm.errors import OptionError

__all__ = ["MODELS", "Model", "build", "select"]

Module = Any
Tensor = Any
Made = tuple[Module, tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Model:
    """A model and what it is given.

    make(quick): the module and its inputs, of which the floating ones take the dtype that is measured. needs: packages.
    modes: "inference", "training", or "dp-sgd" (see `records.py`). compiled: whether torch.compile is measured, too.
    headline: part of the short table.
    """

    name: str
    source: str
    needs: tuple[str, ...]
    make: Callable[[bool], Made]
    modes: tuple[str, ...] = ("inference",)
    compiled: bool = False
    headline: bool = False


def build(model: Model, quick: bool = False) -> Made:
    """The module and its inputs, the same at each call."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model.make(quick)


def select(names: str | None) -> tuple[Model, ...]:
    """The models of a comma-separated list of names or their beginnings; all for None. Raises OptionError."""
    if names is None:
        return MODELS
    wanted = [part.strip() for part in names.split(",") if part.strip()]
    for name in wanted:
        if not any(model.name.startswith(name) for model in MODELS):
            raise OptionError(f"models must be among {', '.join(model.name for model in MODELS)}: got {name!r}")
    if not wanted:
        raise OptionError(f"models must be among {', '.join(model.name for model in MODELS)}: got {names!r}")
    return tuple(model for model in MODELS if model.name.startswith(tuple(wanted)))


def _autoencoder(quick: bool) -> Module:
    from diffusers import AutoencoderKL

    widths, groups = ((32, 64), 8) if quick else ((128, 256, 512, 512), 32)
    return AutoencoderKL(
        block_out_channels=widths, norm_num_groups=groups, layers_per_block=1 if quick else 2,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
    )  # fmt: skip


def _decoder(size: int) -> Callable[[bool], Made]:
    def make(quick: bool) -> Made:
        import torch

        side = 8 if quick else size // 8
        return _autoencoder(quick).decoder, (torch.randn(1, 4, side, side),)

    return make


def _encoder(quick: bool) -> Made:
    import torch

    side = 32 if quick else 256
    return _autoencoder(quick).encoder, (torch.randn(1, 3, side, side),)


def _unet(widths: tuple[int, ...]) -> Callable[[bool], Made]:
    def make(quick: bool) -> Made:
        import torch
        from diffusers import UNet2DConditionModel

        chosen, context = ((32, 64), 16) if quick else (widths, 768)
        module = UNet2DConditionModel(
            block_out_channels=chosen, layers_per_block=1 if quick else 2, cross_attention_dim=context,
            attention_head_dim=8, norm_num_groups=8 if quick else 32,
            down_block_types=(*("CrossAttnDownBlock2D",) * (len(chosen) - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (len(chosen) - 1)),
        )  # fmt: skip
        side = 16 if quick else 32
        return module, (torch.randn(2, 4, side, side), torch.tensor(500), torch.randn(2, 77, context))

    return make


def _segresnet(quick: bool) -> Made:
    import torch
    from monai.networks.nets import SegResNet

    side = 16 if quick else 64
    module = SegResNet(in_channels=1, out_channels=2, init_filters=8 if quick else 32)
    return module, (torch.randn(1, 1, side, side, side),)


def _monai_unet(quick: bool) -> Made:
    import torch
    from monai.networks.nets import UNet

    widths = (8, 16) if quick else (32, 64, 128, 256)
    module = UNet(
        spatial_dims=3, in_channels=1, out_channels=8, channels=widths, strides=(2,) * (len(widths) - 1),
        num_res_units=2, norm=("GROUP", {"num_groups": 8}), act="RELU",
    )  # fmt: skip
    side = 16 if quick else 64
    return module, (torch.randn(1, 1, side, side, side),)


def _resnet(quick: bool) -> Made:
    import torch

    from groupnorm.bench.whole.resnet import ResNet

    module = ResNet((1, 1), 8, 8) if quick else ResNet((3, 4, 6, 3), 64, 32)
    return module, (torch.randn(2, 3, 64, 64) if quick else torch.randn(8, 3, 224, 224),)


def _private(quick: bool) -> Made:
    import torch
    from torch import nn

    width, groups, side = (8, 4, 16) if quick else (64, 16, 32)
    layers: list[Any] = []
    for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(groups, after), nn.ReLU(), nn.AvgPool2d(2)]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * (side // 8) ** 2, 10))
    return module, (torch.randn(4 if quick else 32, 3, side, side),)


_BOTH = ("inference", "training")
_VAE = "AutoencoderKL in the configuration of Stable Diffusion: 128, 256, 512, 512 channels, G = 32; one image"
_SD15 = "UNet2DConditionModel in the configuration of Stable Diffusion 1.5"
MODELS = (
    Model("vae-encode-256", f"{_VAE}; encoder, 256x256", ("diffusers",), _encoder, _BOTH),
    Model("vae-decode-256", f"{_VAE}; decoder, 256x256", ("diffusers",), _decoder(256), compiled=True, headline=True),
    Model("vae-decode-512", f"{_VAE}; decoder, 512x512", ("diffusers",), _decoder(512), headline=True),
    Model("unet-sd15", f"{_SD15}: 320, 640, 1280, 1280 channels; batch 2, 256x256", ("diffusers",),
          _unet((320, 640, 1280, 1280)), headline=True),
    Model("unet-sd15-half", f"{_SD15}, half as wide, to be trained in less memory; batch 2, 256x256", ("diffusers",),
          _unet((160, 320, 640, 640)), ("training",), headline=True),
    Model("segresnet", "SegResNet of MONAI, 32 filters, G = 8; one volume of 64^3", ("monai",), _segresnet, _BOTH,
          headline=True),
    Model("monai-unet", "UNet of MONAI, 32, 64, 128, 256 channels, G = 8, ReLU; one volume of 64^3", ("monai",),
          _monai_unet, _BOTH),
    Model("resnet50-gn", "ResNet-50 of He et al. 2016, with the GroupNorm of Wu and He 2018, G = 32; batch 8, 224^2", (),
          _resnet, _BOTH, compiled=True, headline=True),
    Model("dp-sgd", "three convolutions with GroupNorm and ReLU, per-sample gradients and a step of DP-SGD by Opacus; "
          "batch 32, 32x32", ("opacus",), _private, ("dp-sgd",), headline=True),
)  # fmt: skip
