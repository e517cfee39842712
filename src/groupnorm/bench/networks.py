"""Networks of the benchmark that are in no installed package, and what makes those that are take and give tensors."""

from typing import Any

from torch import nn

__all__ = ["FirstOutput", "private_cnn", "resnet50"]

Module = Any
Tensor = Any


class FirstOutput(nn.Module):
    """A model of diffusers that gives its first output as it is, and not in a dataclass."""

    def __init__(self, model: Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        """The model's first output."""
        return self.model(*inputs, return_dict=False)[0]


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride (v1.5), 1x1 to four times the width, each with a norm; and the shortcut around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.norm1 = nn.GroupNorm(32, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.GroupNorm(32, width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm3 = nn.GroupNorm(32, 4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: Module = nn.Identity()
        if stride != 1 or channels != 4 * width:
            convolution = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.GroupNorm(32, 4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """Written as torchvision's, from which most ResNets descend."""
        shortcut = self.shortcut(x)
        out = self.conv1(x)
        out = self.norm1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.norm2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.norm3(out)
        out += shortcut
        return self.relu(out)


def resnet50(width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> Module:
    """ResNet-50 v1.5 with a GroupNorm of 32 groups in the place of every BatchNorm. width: a multiple of 32."""
    layers: list[Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.GroupNorm(32, width), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    channels = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(channels, width << stage, 2 if stage and not block else 1))
            channels = 4 * (width << stage)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def private_cnn(width: int = 64, classes: int = 10) -> Module:
    """Three stages of two 3x3 convolutions, each with GroupNorm(16) and ReLU, for 32x32 images. width: a multiple of
    16.
    """
    layers: list[Module] = []
    channels = 3
    for stage in range(3):
        for stride in (1, 2):
            layers += [nn.Conv2d(channels, width << stage, 3, stride, 1), nn.GroupNorm(16, width << stage), nn.ReLU()]
            channels = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
