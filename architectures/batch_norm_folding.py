"""Batch normalisation for a network that has none. It is added for training from random weights, then folded in.

Without it, a VGG-16 with random weights hardly starts to learn, because the output of its last layers is almost the
same for all images.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval


def add_batch_norm(network: nn.Module) -> None:
    """Put a batch normalisation behind every convolution."""
    for name, conv in [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]:
        network.set_submodule(name, nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)))


def fold_batch_norm(network: nn.Module) -> None:
    """Undo `add_batch_norm` and put the network into eval mode. Its outputs in eval mode change only by rounding.

    A batch normalisation in eval mode is an affine map, so it can become part of its convolution.
    """
    network.eval()
    for name, pair in [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Sequential)]:
        # _BatchNorm, because SyncBatchNorm (for several GPUs) is not a subclass of nn.BatchNorm2d.
        if len(pair) == 2 and isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], _BatchNorm):
            network.set_submodule(name, fuse_conv_bn_eval(*pair))
