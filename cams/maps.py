"""The result of `GradCAM`: maps, their classes, and the places of their cells in the image."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from cams.receptive_fields import Grid


class LayerMaps(NamedTuple):
    """The maps from one layer.

    Attributes:
        raw: (N, K, h, w) float32 at the layer's resolution, not negative, not normalised.
        grid: the places of the cells in the input.
    """

    raw: Tensor
    grid: Grid


@dataclass(frozen=True)
class CamMaps:
    """The maps of N images for K classes each, and the logits of the same forward pass.

    Attributes:
        layers: the maps from each layer.
        classes: (N, K) index of the class that each map is for.
        logits: (N, C) float32; C is 2 for a network with a single output (`networks.class_logits`).
    """

    layers: tuple[LayerMaps, ...]
    classes: Tensor
    logits: Tensor

    def __getitem__(self, images: slice | Sequence[int]) -> "CamMaps":
        """Return the maps of some of the images, given by a slice or by indices."""
        layers = tuple(LayerMaps(raw[images], grid) for raw, grid in self.layers)
        return CamMaps(layers, self.classes[images], self.logits[images])

    @property
    def raw(self) -> Tensor:
        """(N, K, h, w) maps of the only layer. Values of the same network and method can be compared.

        Raises:
            ValueError: there are several layers; their maps have no common scale.
        """
        if len(self.layers) > 1:
            raise ValueError("maps of several layers have no raw scale in common: use upsampled(size)")
        return self.layers[0].raw

    @property
    def empty(self) -> Tensor:
        """(N, K) bool: True where the map is all zeros, so nothing in the image is evidence for the class."""
        return torch.stack([layer.raw.amax(dim=(2, 3)) <= 0 for layer in self.layers]).all(dim=0)

    def upsampled(self, size: tuple[int, int]) -> Tensor:
        """Return (N, K, *size) maps from 0 to 1: bilinear, each divided by its own maximum.

        Nothing is subtracted, so 0 still means "no evidence"; an empty map stays 0. Each cell is drawn where its
        receptive field is centred. Many programs spread the cells evenly over the image, which moves the map of a
        ResNet by half a cell to the right and down: 16 px at 224 px. For several layers the result is, at each pixel,
        the maximum of their scaled maps (LayerCAM, Jiang et al. 2021).
        """
        return reduce(torch.maximum, (scaled(grid.upsampled(raw, size)) for raw, grid in self.layers))


def scaled(maps: Tensor) -> Tensor:
    """Return (…, H, W) non-negative maps, each divided by its maximum; maps of zeros stay zeros."""
    return maps / maps.amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
