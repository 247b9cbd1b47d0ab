"""torchvision's networks from their published tables, on NumPy or on PyTorch, with tensors by torchvision's names.

A network is run by `FORWARD[name](net, x)`: images [B, C, H, W] to the feature that ours have. Tensors that `net` does
not have yet are drawn when they are first met, so that running it once makes a file of weights.
"""

import numpy as np


class Net:
    """Layers in float64 on NumPy, slow. Channels are those of the paper times `scale`, rounded."""

    def __init__(self, scale=1.0, dim=4096, tensors=None, seed=0):
        self.scale, self.dim, self.tensors = scale, dim, {} if tensors is None else tensors
        self.rng = np.random.default_rng(seed)

    def tensor(self, name, shape, low=None, high=None):
        if name not in self.tensors:
            spread = np.sqrt(2 / np.prod(shape[1:]))
            drawn = self.rng.normal(0, spread, shape) if low is None else self.rng.uniform(low, high, shape)
            self.tensors[name] = drawn.astype(np.float32)
        return self.tensors[name]

    def conv(self, x, name, channels, kernel, stride=1, padding=0, bias=False):
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        pads = (padding, padding) if isinstance(padding, int) else padding
        channels = round(channels * self.scale)
        weight = self.tensor(f"{name}.weight", (channels, x.shape[1], *sides))
        extra = self.tensor(f"{name}.bias", (channels,), -0.5, 0.5) if bias else None
        return self.convolved(x, weight, extra, stride, pads)

    def norm(self, x, name, eps=1e-5):
        size = (x.shape[1],)
        mean, var = (
            self.tensor(f"{name}.running_mean", size, -0.5, 0.5),
            self.tensor(f"{name}.running_var", size, 0.5, 1.5),
        )
        weight, bias = self.tensor(f"{name}.weight", size, 0.5, 1.5), self.tensor(f"{name}.bias", size, -0.5, 0.5)
        self.tensors[f"{name}.num_batches_tracked"] = np.array(7)
        return self.normed(x, mean, var, weight, bias, eps)

    def linear(self, x, name, outputs):
        weight, bias = (
            self.tensor(f"{name}.weight", (outputs, x.shape[1])),
            self.tensor(f"{name}.bias", (outputs,), -0.5, 0.5),
        )
        return self.product(x, weight, bias)

    def convolved(self, x, weight, bias, stride, pads):
        x = np.pad(x, ((0, 0), (0, 0), (pads[0],) * 2, (pads[1],) * 2))
        high, wide = weight.shape[2:]
        rows, columns = (x.shape[2] - high) // stride + 1, (x.shape[3] - wide) // stride + 1
        out = np.zeros((len(x), len(weight), rows, columns))
        for i in range(high):
            for j in range(wide):
                seen = x[:, :, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
                out += np.einsum("bchw,oc->bohw", seen, weight[:, :, i, j].astype(np.float64), optimize=True)
        return out if bias is None else out + bias[:, None, None]

    def normed(self, x, mean, var, weight, bias, eps):
        mean, var, weight, bias = (part.astype(np.float64)[:, None, None] for part in (mean, var, weight, bias))
        return (x - mean) / np.sqrt(var + eps) * weight + bias

    def product(self, x, weight, bias):
        return x @ weight.T.astype(np.float64) + bias

    def relu(self, x):
        return np.maximum(x, 0)

    def windows(self, x, size, stride):
        rows, columns = (x.shape[2] - size) // stride + 1, (x.shape[3] - size) // stride + 1
        return [
            x[:, :, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
            for i in range(size)
            for j in range(size)
        ]

    def max_pool(self, x, size, stride, padding=0):
        pads = ((0, 0), (0, 0), (padding, padding), (padding, padding))
        return np.max(self.windows(np.pad(x, pads, constant_values=-np.inf), size, stride), axis=0)

    def mean_of_nine(self, x):
        return np.mean(self.windows(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), 3, 1), axis=0)

    def cells(self, x, side):
        out = np.zeros((*x.shape[:2], side, side))
        for i in range(side):
            for j in range(side):
                rows, columns = (
                    slice(k * size // side, -(-(k + 1) * size // side))
                    for k, size in ((i, x.shape[2]), (j, x.shape[3]))
                )
                out[:, :, i, j] = x[:, :, rows, columns].mean(axis=(2, 3))
        return out

    def joined(self, parts):
        return np.concatenate(parts, axis=1)


class TorchNet(Net):
    """The same by torch.nn.functional, on torch tensors."""

    def tensor(self, name, shape, *limits):
        import torch

        return torch.from_numpy(super().tensor(name, tuple(shape), *limits))

    def convolved(self, x, weight, bias, stride, pads):
        from torch.nn import functional as f

        return f.conv2d(x, weight, bias, stride, tuple(pads))

    def normed(self, x, mean, var, weight, bias, eps):
        from torch.nn import functional as f

        return f.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    def product(self, x, weight, bias):
        from torch.nn import functional as f

        return f.linear(x, weight, bias)

    def relu(self, x):
        return x.clamp(min=0)

    def max_pool(self, x, size, stride, padding=0):
        from torch.nn import functional as f

        return f.max_pool2d(x, size, stride, padding)

    def mean_of_nine(self, x):
        from torch.nn import functional as f

        return f.avg_pool2d(x, 3, 1, 1)

    def cells(self, x, side):
        from torch.nn import functional as f

        return f.adaptive_avg_pool2d(x, side)

    def joined(self, parts):
        import torch

        return torch.cat(parts, dim=1)


def _classified(net, x, side, first, second, last):
    """The two dense layers of AlexNet and VGG, of which the second is the feature; the third is drawn and not asked."""
    x = net.cells(x, side).reshape(len(x), -1)
    x = net.linear(net.relu(net.linear(x, f"classifier.{first}", net.dim)), f"classifier.{second}", net.dim)
    net.linear(x, f"classifier.{last}", 10)
    return x


def alexnet_owt(net, x):
    """torchvision's AlexNet: no batch norm."""
    for place, channels, kernel, stride, padding, pools in (
        (0, 64, 11, 4, 2, True), (3, 192, 5, 1, 2, True), (6, 384, 3, 1, 1, False), (8, 256, 3, 1, 1, False),
        (10, 256, 3, 1, 1, True),
    ):  # fmt: skip
        x = net.relu(net.conv(x, f"features.{place}", channels, kernel, stride, padding, bias=True))
        x = net.max_pool(x, 3, 2) if pools else x
    return _classified(net, x, 6, 1, 4, 6)


def alexnet(net, x):
    """DeepCluster's AlexNet: batch norm after each convolution."""
    for place, channels, kernel, stride, padding, pools in (
        (0, 96, 11, 4, 2, True), (4, 256, 5, 1, 2, True), (8, 384, 3, 1, 1, False), (11, 384, 3, 1, 1, False),
        (14, 256, 3, 1, 1, True),
    ):  # fmt: skip
        x = net.conv(x, f"features.{place}", channels, kernel, stride, padding, bias=True)
        x = net.relu(net.norm(x, f"features.{place + 1}"))
        x = net.max_pool(x, 3, 2) if pools else x
    return _classified(net, x, 6, 1, 4, 6)


def vgg16(net, x):
    place = 0
    for channels in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if channels == "M":
            x, place = net.max_pool(x, 2, 2), place + 1
            continue
        x = net.conv(x, f"features.{place}", channels, 3, 1, 1, bias=True)
        x, place = net.relu(net.norm(x, f"features.{place + 1}")), place + 3
    return _classified(net, x, 7, 0, 3, 6)


def _resnet(net, x, blocks, bottleneck):
    x = net.relu(net.norm(net.conv(x, "conv1", 64, 7, 2, 3), "bn1"))
    x, before = net.max_pool(x, 3, 2, 1), 64
    for stage, count in enumerate(blocks, 1):
        width = 64 * 2 ** (stage - 1)
        after = 4 * width if bottleneck else width
        for block in range(count):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            convs = ((width, 1, 1, 0), (width, 3, stride, 1), (after, 1, 1, 0))
            convs = convs if bottleneck else ((width, 3, stride, 1), (width, 3, 1, 1))
            y = x
            for number, conv in enumerate(convs, 1):
                y = net.norm(net.conv(y, f"{name}.conv{number}", *conv), f"{name}.bn{number}")
                y = y if number == len(convs) else net.relu(y)
            if stride != 1 or before != after:
                x = net.norm(net.conv(x, f"{name}.downsample.0", after, 1, stride), f"{name}.downsample.1")
            x, before = net.relu(x + y), after
    x = net.cells(x, 1).reshape(len(x), -1)
    net.linear(x, "fc", 10)
    return x


def resnet18(net, x):
    return _resnet(net, x, (2, 2, 2, 2), False)


def resnet34(net, x):
    return _resnet(net, x, (3, 4, 6, 3), False)


def resnet50(net, x):
    return _resnet(net, x, (3, 4, 6, 3), True)


def inception_v3(net, x):
    def layer(x, name, channels, kernel, stride=1, padding=0):
        return net.relu(net.norm(net.conv(x, f"{name}.conv", channels, kernel, stride, padding), f"{name}.bn", 1e-3))

    def branch(x, name, *layers):
        for part, *conv in layers:
            x = layer(x, f"{name}.branch{part}", *conv)
        return x

    def pool(x, name, channels):
        return layer(net.mean_of_nine(x), f"{name}.branch_pool", channels, 1)

    for name, *conv in (("1a_3x3", 32, 3, 2), ("2a_3x3", 32, 3), ("2b_3x3", 64, 3, 1, 1)):
        x = layer(x, f"Conv2d_{name}", *conv)
    x = net.max_pool(x, 3, 2)
    x = layer(layer(x, "Conv2d_3b_1x1", 80, 1), "Conv2d_4a_3x3", 192, 3)
    x = net.max_pool(x, 3, 2)
    for name, last in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        double = ("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3, 1, 1), ("3x3dbl_3", 96, 3, 1, 1)
        five = ("5x5_1", 48, 1), ("5x5_2", 64, 5, 1, 2)
        x = net.joined([branch(x, name, ("1x1", 64, 1)), branch(x, name, *five), branch(x, name, *double),
                        pool(x, name, last)])  # fmt: skip
    double = ("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3, 1, 1), ("3x3dbl_3", 96, 3, 2)
    x = net.joined([branch(x, "Mixed_6a", ("3x3", 384, 3, 2)), branch(x, "Mixed_6a", *double), net.max_pool(x, 3, 2)])
    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    for name, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        seven = ("7x7_1", c, 1), ("7x7_2", c, *row), ("7x7_3", 192, *column)
        double = (
            ("7x7dbl_1", c, 1), ("7x7dbl_2", c, *column), ("7x7dbl_3", c, *row), ("7x7dbl_4", c, *column),
            ("7x7dbl_5", 192, *row),
        )  # fmt: skip
        x = net.joined([branch(x, name, ("1x1", 192, 1)), branch(x, name, *seven), branch(x, name, *double),
                        pool(x, name, 192)])  # fmt: skip
    three = ("3x3_1", 192, 1), ("3x3_2", 320, 3, 2)
    seven = ("7x7x3_1", 192, 1), ("7x7x3_2", 192, *row), ("7x7x3_3", 192, *column), ("7x7x3_4", 192, 3, 2)
    x = net.joined([branch(x, "Mixed_7a", *three), branch(x, "Mixed_7a", *seven), net.max_pool(x, 3, 2)])
    row, column = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    for name in ("Mixed_7b", "Mixed_7c"):
        once = branch(x, name, ("3x3_1", 384, 1))
        twice = branch(x, name, ("3x3dbl_1", 448, 1), ("3x3dbl_2", 384, 3, 1, 1))
        x = net.joined([
            branch(x, name, ("1x1", 320, 1)), branch(once, name, ("3x3_2a", 384, *row)),
            branch(once, name, ("3x3_2b", 384, *column)), branch(twice, name, ("3x3dbl_3a", 384, *row)),
            branch(twice, name, ("3x3dbl_3b", 384, *column)), pool(x, name, 192),
        ])  # fmt: skip
    x = net.cells(x, 1).reshape(len(x), -1)
    net.linear(x, "fc", 10)
    return x


FORWARD = {
    network.__name__: network for network in (alexnet, alexnet_owt, vgg16, resnet18, resnet34, resnet50, inception_v3)
}
