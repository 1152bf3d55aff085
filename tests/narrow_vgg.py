"""A VGG that is quick to build. The usual head has 120 million weights to draw."""

import torch
from torch import nn

from networks import build_network


def narrow_vgg16(outputs):
    """Return VGG-16 in eval mode, with linear layers of 64 and 32 units and torchvision's initial weights."""
    with torch.device("meta"):
        network = build_network("vgg16", outputs, hidden_units=(64, 32), dropout=0.5)
    network.to_empty(device="cpu")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
    return network.eval()


def eval_network(name, outputs):
    """Return a network with random weights in eval mode. VGG-16 is the narrow one."""
    torch.manual_seed(0)
    return narrow_vgg16(outputs) if name == "vgg16" else build_network(name, outputs).eval()
