"""Batch normalisation for a network that has none: put in to train from random weights, folded into it afterwards.

Without it a VGG-16 with random weights hardly starts to learn: towards its end all images look the same to it.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval


def add_batch_norm(network: nn.Module) -> None:
    """Put a batch normalisation behind every convolution."""
    for name, conv in [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]:
        network.set_submodule(name, nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)))


def fold_batch_norm(network: nn.Module) -> None:
    """Undo `add_batch_norm` and put the network into eval mode, where its outputs stay the same but for rounding.

    A batch normalisation in eval mode is an affine map, which becomes part of its convolution.
    """
    network.eval()
    for name, pair in [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Sequential)]:
        # torch's SyncBatchNorm, of several GPUs, is not an nn.BatchNorm2d.
        if len(pair) == 2 and isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], _BatchNorm):
            network.set_submodule(name, fuse_conv_bn_eval(*pair))
