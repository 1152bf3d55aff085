"""Networks that can be trained from random weights on a CPU: LeNet-5, a small network, pre-activation ResNets.

All take (N, 3, H, W) images of 32 px and more and return (N, outputs) logits.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn


def named_sequence(**modules: nn.Module) -> nn.Sequential:
    """Return the modules as a sequence, by name."""
    return nn.Sequential(OrderedDict(modules))


def lenet5(outputs: int = 1000) -> nn.Sequential:
    """Return LeNet-5 (LeCun et al. 1998, Proc. IEEE 86, section II-B) in modern form.

    Layers and widths are those of the paper: 6 maps of 5 × 5, pooling, 16 of 5 × 5, pooling, 120, 84, outputs. The
    paper's scaled tanh, trainable sub-sampling, partial table of connections and radial basis functions are replaced
    by their modern forms: ReLU, maximum pooling, full connections and a linear layer. Pooling to 5 × 5 makes the
    linear layers fit images of any size. At 32 px, the paper's size, it changes nothing.
    """
    return named_sequence(
        features=named_sequence(
            conv1=nn.Conv2d(3, 6, 5),
            relu1=nn.ReLU(inplace=True),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(inplace=True),
            pool2=nn.MaxPool2d(2),
        ),
        pool=nn.AdaptiveAvgPool2d(5),
        flatten=nn.Flatten(),
        classifier=named_sequence(
            fc1=nn.Linear(16 * 5 * 5, 120),
            relu1=nn.ReLU(inplace=True),
            fc2=nn.Linear(120, 84),
            relu2=nn.ReLU(inplace=True),
            fc3=nn.Linear(84, outputs),
        ),
    )


def small_cnn(outputs: int = 1000) -> nn.Sequential:
    """Return a network of 0.88 million parameters that learns from X-rays of about 128 px without a GPU.

    It has five blocks of 3 × 3 convolution, 2 × 2 maximum pooling (not in the last block), batch normalisation and
    ReLU. Global average pooling, dropout and one linear layer follow. In fp32, in batches of 32 in channels_last, it
    trains on about 150 images a second on two idle cores of a Xeon at 2.8 GHz. Its maps have 8 × 8 cells at 128 px.
    """
    widths = (3, 24, 48, 96, 192, 384)
    blocks = [_conv_block(before, after, pooled=after != widths[-1]) for before, after in pairwise(widths)]
    network = named_sequence(
        features=nn.Sequential(*blocks),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=named_sequence(dropout=nn.Dropout(0.2), fc=nn.Linear(widths[-1], outputs)),
    )
    return _with_kaiming_weights(network)


def _conv_block(before: int, after: int, *, pooled: bool) -> nn.Sequential:
    # The convolution has no bias, because the batch normalisation would remove it. Pooling comes before the
    # normalisation, which then has a quarter of the pixels. So it trains on a third more images a second (measured).
    pooling = {"pool": nn.MaxPool2d(2)} if pooled else {}
    return named_sequence(
        conv=nn.Conv2d(before, after, 3, padding=1, bias=False),
        **pooling,
        bn=nn.BatchNorm2d(after),
        relu=nn.ReLU(inplace=True),
    )


def resnet_v2(outputs: int = 1000, *, n: int = 6) -> nn.Sequential:
    """Return a pre-activation ResNet of depth 9n + 2 with bottlenecks, the CIFAR form of He et al. 2016 ("Identity
    mappings in deep residual networks", ECCV, arXiv:1603.05027).

    It has three stages of `n` blocks with 64, 128 and 256 maps (a quarter of these inside the bottlenecks), then
    normalisation, ReLU, global average pooling and one linear layer. n = 6 is depth 56.

    The first convolution has stride 2, for X-rays of 100 to 224 px. The paper has stride 1, for images of 32 px. At
    224 px stride 1 would take four times the time and memory. With stride 2 the last stage has 28 × 28 cells at
    224 px, more than the ImageNet networks have.
    """
    blocks = {}
    before = 16
    for stage, after in enumerate((64, 128, 256), 1):
        for block in range(1, n + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            blocks[f"stage{stage}_{block}"] = _PreActivation(before, after // 4, after, stride)
            before = after
    network = named_sequence(
        stem=nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        blocks=named_sequence(**blocks),
        bn=nn.BatchNorm2d(before),
        relu=nn.ReLU(inplace=True),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Linear(before, outputs),
    )
    return _with_kaiming_weights(network)


class _PreActivation(nn.Module):
    """A bottleneck of He et al. 2016, figure 4 (e): normalisation and ReLU come before each convolution.

    The block's output is its input plus what its convolutions compute. Where the number of maps changes, the input goes
    through a 1 × 1 convolution first. As in the authors' code, this convolution sees the activated input.
    """

    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, inner, 1, stride=stride, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, after, 1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, after, H / stride, W / stride) for (N, before, H, W)."""
        active = torch.relu(self.bn1(x))
        y = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        y = self.conv3(torch.relu(self.bn3(y)))
        return y + (x if self.shortcut is None else self.shortcut(active))


def _with_kaiming_weights(network: nn.Sequential) -> nn.Sequential:
    """Return the network, with new convolution weights of variance 2 / fan-out (He et al. 2015, arXiv:1502.01852)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
