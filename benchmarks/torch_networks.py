"""The networks of jaxclust as anyone would write them in PyTorch: same layers, same sizes; images of `side` pixels.

`tests/test_benchmarks.py` checks that both compute the same. A body gives the feature before its last ReLU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

VGG16 = (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8, 0)  # channels in those of the first; 0: pooling


class Clusterer(nn.Module):
    """A body and the linear layer that predicts clusters from its feature after a ReLU."""

    def __init__(self, body: nn.Module, dim: int, k: int) -> None:
        super().__init__()
        self.body = body
        self.top = nn.Linear(dim, k)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.top(torch.relu(self.body(images)))
        return logits


def convnet(channels: int, k: int, width: int = 32, dim: int = 128, side: int = 28) -> Clusterer:
    """Three blocks of a 3x3 convolution, batch norm, ReLU and 2x2 pooling; a dense feature."""
    layers: list[nn.Module] = []
    for block in range(3):
        layers += [*_conv(channels, width << block, 3), nn.MaxPool2d(2)]
        channels, side = width << block, side // 2
    return Clusterer(nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, dim)), dim, k)


def alexnet(channels: int, k: int, width: int = 96, dim: int = 4096, side: int = 224) -> Clusterer:
    """AlexNet with batch norm, without groups."""
    second, third = round(width * 8 / 3), 4 * width
    layers = [
        *_conv(channels, width, 11, 4, 2), nn.MaxPool2d(3, 2),
        *_conv(width, second, 5), nn.MaxPool2d(3, 2),
        *_conv(second, third, 3), *_conv(third, third, 3), *_conv(third, second, 3), nn.MaxPool2d(3, 2),
        nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Dropout(), *_dense(36 * second, dim), nn.Linear(dim, dim),
    ]  # fmt: skip
    return Clusterer(nn.Sequential(*layers), dim, k)


def vgg16(channels: int, k: int, width: int = 64, dim: int = 4096, side: int = 224) -> Clusterer:
    """VGG16 with batch norm."""
    layers: list[nn.Module] = []
    for multiple in VGG16:
        layers += _conv(channels, width * multiple, 3) if multiple else [nn.MaxPool2d(2)]
        channels = width * multiple or channels
    layers += [nn.AdaptiveAvgPool2d(7), nn.Flatten(), *_dense(49 * channels, dim), nn.Linear(dim, dim)]
    return Clusterer(nn.Sequential(*layers), dim, k)


def resnet18(channels: int, k: int, width: int = 64, side: int = 32) -> Clusterer:
    """ResNet-18 with the 3x3 stem for small images."""
    layers = _conv(channels, width, 3, bias=False)
    channels = width
    for stage in range(4):
        for block in range(2):
            layers.append(_Block(channels, width << stage, 2 if stage and not block else 1))
            channels = width << stage
    return Clusterer(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels, k)


class _Block(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        conv1, norm1, relu = _conv(channels, width, 3, stride, bias=False)
        conv2, norm2, _ = _conv(width, width, 3, bias=False)
        self.residual = nn.Sequential(conv1, norm1, relu, conv2, norm2)
        short: Sequence[nn.Module] = ()
        if stride > 1 or channels != width:
            short = (nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Sequential(*short)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


def _conv(
    channels: int, width: int, kernel: int, stride: int = 1, padding: int | None = None, bias: bool = True
) -> list[nn.Module]:
    """Convolution, batch norm and ReLU."""
    padding = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(channels, width, kernel, stride, padding, bias=bias)
    return [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


def _dense(size: int, dim: int) -> list[nn.Module]:
    """A dense layer, ReLU and dropout."""
    return [nn.Linear(size, dim), nn.ReLU(inplace=True), nn.Dropout()]
