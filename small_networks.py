"""Networks to train from random weights on a CPU: LeNet-5, a small network, pre-activation ResNets.

All take (N, 3, H, W) images of 32 px and more and return (N, outputs) logits.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998, Proc. IEEE 86, section II-B) in today's dress.

    Its layers and widths are the paper's: 6 maps of 5 × 5, pooling, 16 of 5 × 5, pooling, 120, 84, outputs.
    Where the paper has scaled tanh, trainable sub-sampling, a partial table of connections and radial basis
    functions, this has what is usual since: ReLU, maximum pooling, full connections and a linear layer. At
    the paper's 32 px the pooling to 5 × 5 is the identity; it makes the linear layers fit any larger size.
    """

    def __init__(self, outputs: int = 1000) -> None:
        features = {
            "conv1": nn.Conv2d(3, 6, 5),
            "relu1": nn.ReLU(inplace=True),
            "pool1": nn.MaxPool2d(2),
            "conv2": nn.Conv2d(6, 16, 5),
            "relu2": nn.ReLU(inplace=True),
            "pool2": nn.MaxPool2d(2),
        }
        classifier = {
            "fc1": nn.Linear(16 * 5 * 5, 120),
            "relu1": nn.ReLU(inplace=True),
            "fc2": nn.Linear(120, 84),
            "relu2": nn.ReLU(inplace=True),
            "fc3": nn.Linear(84, outputs),
        }
        super().__init__()
        self.features = nn.Sequential(OrderedDict(features))
        self.pool = nn.AdaptiveAvgPool2d(5)
        self.classifier = nn.Sequential(OrderedDict(classifier))

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, outputs) logits for (N, 3, H, W) images."""
        return self.classifier(self.pool(self.features(images)).flatten(1))


class SmallCNN(nn.Module):
    """Five blocks of 3 × 3 convolution, 2 × 2 maximum pooling, batch normalisation, ReLU (the last without
    pooling), then global average pooling, dropout and one linear layer. 0.88 million parameters.

    Made to learn from X-rays of about 128 px without a GPU: in fp32, in batches of 32 in channels_last, it
    trains on about 150 images a second on two idle cores of a Xeon at 2.8 GHz. The last activation, and so the
    map of Grad-CAM, has 8 × 8 cells at 128 px.
    """

    def __init__(
        self, outputs: int = 1000, *, widths: tuple[int, ...] = (24, 48, 96, 192, 384), dropout: float = 0.2
    ) -> None:
        befores = (3, *widths[:-1])
        last = len(widths) - 1
        blocks = [
            _conv_block(before, width, pooled=number < last)
            for number, (before, width) in enumerate(zip(befores, widths, strict=True))
        ]
        classifier = {"dropout": nn.Dropout(dropout), "fc": nn.Linear(widths[-1], outputs)}
        super().__init__()
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(OrderedDict(classifier))
        _kaiming(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, outputs) logits for (N, 3, H, W) images."""
        return self.classifier(self.pool(self.features(images)).flatten(1))


def _conv_block(before: int, width: int, *, pooled: bool) -> nn.Sequential:
    # No bias before a batch normalisation, which would take it out again. Pooling comes first, for then the
    # rest of the block has a quarter of the pixels to do: a third more images a second, measured.
    parts = {
        "conv": nn.Conv2d(before, width, 3, padding=1, bias=False),
        **({"pool": nn.MaxPool2d(2)} if pooled else {}),
        "bn": nn.BatchNorm2d(width),
        "relu": nn.ReLU(inplace=True),
    }
    return nn.Sequential(OrderedDict(parts))


class _PreActivation(nn.Module):
    """A bottleneck of He et al. 2016, figure 4 (e): normalisation and ReLU come before each convolution, and
    nothing but addition stands on the way from one block's input to the next.

    Where the shape changes, the shortcut is a 1 × 1 convolution of the activated input, as in the authors'
    code: it sees what the block's first convolution sees.
    """

    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, inner, 1, stride=stride, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, after, 1, bias=False)
        changes = stride != 1 or before != after
        self.shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, after, H / stride, W / stride) for (N, before, H, W)."""
        active = torch.relu(self.bn1(x))
        y = self.conv1(active)
        y = self.conv2(torch.relu(self.bn2(y)))
        y = self.conv3(torch.relu(self.bn3(y)))
        return y + (x if self.shortcut is None else self.shortcut(active))


class ResNetV2(nn.Module):
    """Pre-activation ResNet of depth 9n + 2 with bottlenecks, the CIFAR form of He et al. 2016 ("Identity
    mappings in deep residual networks", ECCV, arXiv:1603.05027): three stages of `n` blocks, 64, 128 and 256
    maps wide (inside the bottlenecks a quarter), then normalisation, ReLU, global average pooling, one
    linear layer. n = 6 is depth 56.

    `stem_stride` is 1 in the paper, whose images have 32 px. The default of 2 is for X-rays of 100–224 px:
    a first stage at 224 × 224 would cost four times the time and memory, and the last stage's 28 × 28 cells
    are finer than those of the ImageNet networks as it is.
    """

    def __init__(self, outputs: int = 1000, *, n: int = 6, stem_stride: int = 2) -> None:
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        before = 16
        for stage, after in enumerate((64, 128, 256), 1):
            for block in range(n):
                stride = 2 if stage > 1 and block == 0 else 1
                blocks[f"stage{stage}_{block + 1}"] = _PreActivation(before, after // 4, after, stride)
                before = after
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=stem_stride, padding=1, bias=False)
        self.blocks = nn.Sequential(blocks)
        self.bn = nn.BatchNorm2d(before)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(before, outputs)
        _kaiming(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, outputs) logits for (N, 3, H, W) images."""
        features = self.relu(self.bn(self.blocks(self.stem(images))))
        return self.classifier(self.pool(features).flatten(1))


def _kaiming(network: nn.Module) -> None:
    """Draw weights of convolutions with variance 2 / fan-out (He et al. 2015, arXiv:1502.01852)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
