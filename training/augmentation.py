"""Random views of whole batches of X-rays.

Random numbers are first drawn for the whole batch, then used. Processes that share a batch draw the same numbers and
take their own rows. So an image gets the same view with any number of processes.
"""

import math
from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample


class Draws(namedtuple("Draws", "flip left top width height angle shift_x shift_y scale brightness contrast")):
    """The random numbers for N images: (N,) tensors on the CPU, float32 (`flip`: bool).

    Attributes:
        flip: whether the image is mirrored.
        left, top, width, height: the crop, as fractions of the image.
        angle: degrees, clockwise.
        shift_x, shift_y: shifts to the right and down, as fractions of the side.
        scale, brightness, contrast: factors.
    """

    def rows(self, which: slice | Tensor) -> "Draws":
        """Return the draws of some of the images, given as a slice, indices or bool."""
        return Draws(*(values[which] for values in self))


@dataclass(frozen=True)
class Augmentation:
    """The random changes of training images; by default there are none.

    Source: torchvision's RandomResizedCrop, RandomAffine and ColorJitter. There are two differences: shifts are not
    rounded to pixels, and a crop that would not fit is made squarer. (torchvision draws another crop.)

    Attributes:
        horizontal_flip: whether images are mirrored with probability 0.5.
        smallest_crop: the smallest area of a crop, as a share (0 to 1) of the image's area. A crop is enlarged to the
            full size; its width over height is 0.9 to 1.1.
        rotation: the largest angle in degrees (0 to 180), to either side.
        translation: the largest shift as a share of the side (0 to below 1), along either axis.
        scale: the smallest and the largest factor of the size.
        brightness: the largest change b (0 to below 1): the factor is between 1 - b and 1 + b.
        contrast: the largest change of the contrast, likewise.
    """

    horizontal_flip: bool = False
    smallest_crop: float = 1.0
    rotation: float = 0.0
    translation: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    brightness: float = 0.0
    contrast: float = 0.0

    @property
    def views(self) -> int | None:
        """How many views an image can have: 1 (unchanged), 2 (unchanged and mirrored), or None (no limit)."""
        return {Augmentation(): 1, Augmentation(horizontal_flip=True): 2}.get(self)

    def draw(self, number: int, generator: torch.Generator) -> Draws:
        """Return draws for `number` images from a CPU generator.

        Only the numbers that these settings use are drawn. The others leave an image as it is.
        """

        def uniform(low: float, high: float) -> Tensor:
            if low == high:
                return torch.full((number,), float(low))
            return torch.rand(number, generator=generator) * (high - low) + low

        flip = uniform(0, float(self.horizontal_flip)) > 0.5
        crop = torch.zeros(number), torch.zeros(number), torch.ones(number), torch.ones(number)
        if self.smallest_crop < 1:
            area = uniform(self.smallest_crop, 1)
            # The aspect of a crop that would not fit into the image gets closer to 1; its area stays.
            aspect = uniform(math.log(0.9), math.log(1.1)).clamp(area.log(), -area.log())
            width, height = (((area.log() + sign * aspect) / 2).exp() for sign in (1, -1))
            crop = uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height), width, height
        return Draws(
            flip,
            *crop,
            angle=uniform(-self.rotation, self.rotation),
            shift_x=uniform(-self.translation, self.translation),
            shift_y=uniform(-self.translation, self.translation),
            scale=uniform(*self.scale),
            brightness=uniform(1 - self.brightness, 1 + self.brightness),
            contrast=uniform(1 - self.contrast, 1 + self.contrast),
        )

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return views (B, 1, S, S) float32, 0 to 255, of (B, 1, S, S) uint8 images, on their device.

        One bilinear interpolation enlarges the crop, turns and scales it about the centre, shifts it and mirrors it, in
        this order. Brightness follows, then contrast about the image's mean. A flip alone is exact. Outside the
        image all is black; its outermost half pixel fades into black. Parts outside the crop may become visible.

        Args:
            images: the images.
            draws: B draws, from `draw` of the same settings.
        """
        brightness, contrast, flip = (
            values.to(images.device)[:, None, None, None] for values in (draws.brightness, draws.contrast, draws.flip)
        )
        moved = self.smallest_crop < 1 or self.rotation or self.translation or self.scale != (1.0, 1.0)
        if self.horizontal_flip and not moved:
            images = torch.where(flip, images.flip(-1), images)
        shown = images.float()
        if moved:
            shown = grid_sample(shown, _grid(draws, images.shape[-1], images.device), align_corners=False)
            shown.clamp_(0, 255)  # rounding may give values outside this range
        if self.brightness:
            shown.mul_(brightness).clamp_(0, 255)
        if self.contrast:
            # The mean is taken row by row: with few images, torch would split the sum over an image among threads.
            # The number of threads would then change the rounding.
            mean = shown.mean(-1, keepdim=True).mean(-2, keepdim=True)
            shown.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 255)
        return shown


def _grid(draws: Draws, size: int, device: torch.device) -> Tensor:
    """Return (B, S, S, 2) float32: for each pixel of a view its position (x, y) in the image, -1 to 1."""
    # Computed in float64, then rounded: the last bit of torch's cosine may depend on where the angle is in the tensor.
    _, left, top, width, height, angle, shift_x, shift_y, scale, *_ = (values.double() for values in draws)
    cos, sin = angle.deg2rad().cos() / scale, angle.deg2rad().sin() / scale
    mirror, x, y = 1 - 2 * draws.flip.double(), 2 * shift_x, 2 * shift_y
    across = torch.stack([width * mirror * cos, -height * mirror * sin], 1)
    down = torch.stack([width * sin, height * cos], 1)
    origin_x = 2 * left + width - 1 - width * (cos * x + sin * y)
    origin_y = 2 * top + height - 1 + height * (sin * x - cos * y)
    origin = torch.stack([origin_x, origin_y], 1)
    centres = (torch.arange(size, dtype=torch.float64) * 2 + 1) / size - 1
    columns = (across[..., None] * centres).to(device, torch.float32)[:, :, None]
    rows = (origin[..., None] + down[..., None] * centres).to(device, torch.float32)[..., None]
    return (columns + rows).permute(0, 2, 3, 1)  # x and y are separate in memory, which is faster
