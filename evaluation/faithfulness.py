"""Score how faithful maps are: does the prediction of the network depend on the pixels that the map names?

These scores need no lesion mask. `localization` tells whether a map lies where a radiologist would look. If the network
looks elsewhere, a faithful map lies elsewhere too. `randomisation` tests whether the map depends on the weights.

Maps are (N, H, W) at the images' size, each scaled by its maximum to 0..1 or all zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCKS = 14  # equally salient pixels change in squares of 1/14 of the image's side, the patch size of many networks
LEVELS = 2**16  # map values are rounded to these levels: finer differences are rounding errors of upsampling
BLUR = 0.1  # sigma as a share of the image's shorter side: enough to hide a lesion or a rib
BATCH = 32  # images in one forward pass


class ClassifiedImages(NamedTuple):
    """Images, the class that each is explained for, and the network that classifies them.

    Attributes:
        probabilities: takes (M, 3, H, W) normalised images, returns (M, C) in 0..1.
        images: (N, 3, H, W), normalised, so that 0 is the mean.
        classes: (N,) class indices.
        baseline: (N, 3, H, W), what the pixels of each image become when they are deleted.
    """

    probabilities: Callable[[Tensor], Tensor]
    images: Tensor
    classes: Tensor
    baseline: Tensor


def deletion_insertion(subject: ClassifiedImages, maps: Tensor, *, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Return the areas under the class's probability curves as pixels are deleted or inserted, most salient first.

    Petsiuk et al. 2018, "RISE", BMVC, arXiv:1806.07421. Deletion sets pixels to the baseline. Insertion puts them
    into a blurred copy of the image. The sigma of the blur is `BLUR` of the image's shorter side. RISE's sigma, 5 of
    224 pixels, leaves lesions visible.

    Pixels with equal map values (a uniform map, or the zeros of a map) change block by block in a random order. The
    order depends only on `seed` and the image's index, so all maps of the same images share it. In reading order,
    the image would disappear from the top. Single pixels in a random order would be noise, and networks react to noise.

    Args:
        subject: the images and the network.
        maps: (N, H, W) maps of these images on their device.
        steps: the curve has `steps` + 1 points over the share of changed pixels, 0..1 (trapezoidal rule).
        seed: fixes the order of pixels with equal map values.

    Returns:
        (N,) float64 areas, 0..1, named "deletion" and "insertion". A faithful map has a small deletion and a large
        insertion.
    """
    images, pixels = subject.images, maps[0].numel()
    counts = torch.arange(steps + 1, device=images.device) * pixels // steps
    classes = subject.classes.repeat_interleave(len(counts))

    def area(before: Tensor, after: Tensor) -> np.ndarray:
        def changed(jobs: Tensor) -> Tensor:
            image, step = jobs // len(counts), jobs % len(counts)
            chosen = ranks[image] < counts[step, None, None]
            return torch.where(chosen[:, None], after[image], before[image])

        curve = _confidence(subject, changed, classes).reshape(len(maps), -1)
        return np.trapezoid(curve, counts.cpu().numpy() / pixels, axis=1)

    with torch.inference_mode():
        ranks = _pixel_ranks(maps, seed)
        return {"deletion": area(images, subject.baseline), "insertion": area(_blurred(images), images)}


def masked_confidence(subject: ClassifiedImages, maps: Tensor) -> dict[str, np.ndarray]:
    """Return the confidence in the class for whole images, and its change after each image is masked by its map.

    The masked image is image · map + baseline · (1 - map). Average Drop and Increase in Confidence: Chattopadhay et
    al. 2018, "Grad-CAM++", WACV, arXiv:1710.11063, section 4.1.

    A map of ones hides nothing, so it has the best drop, 0 (Poppi et al. 2021, arXiv:2104.10252). Read drop and
    increase together with a score that is bad for large maps, such as the deletion area.

    Args:
        subject: the images and the network.
        maps: (N, H, W) maps of these images on their device.

    Returns:
        (N,) float64 values by name:

        - probability: of the whole image;
        - drop: max(0, whole - masked) / whole, 0..1, and 0 where whole is 0; its mean is the Average Drop;
        - increase: 1.0 where masked > whole, else 0.0; its mean is the Increase in Confidence.
    """
    images, baseline, classes = subject.images, subject.baseline, subject.classes

    def masked_images(jobs: Tensor) -> Tensor:
        weight = maps[jobs, None].to(images.dtype)
        return images[jobs] * weight + baseline[jobs] * (1 - weight)

    with torch.inference_mode():
        whole = _confidence(subject, lambda jobs: images[jobs], classes)
        masked = _confidence(subject, masked_images, classes)
    lost = np.maximum(whole - masked, 0)
    drop = np.divide(lost, whole, out=np.zeros_like(lost), where=whole > 0)
    return {"probability": whole, "drop": drop, "increase": (masked > whole).astype(np.float64)}


def _confidence(subject: ClassifiedImages, inputs: Callable[[Tensor], Tensor], classes: Tensor) -> np.ndarray:
    """Return (M,) float64 probabilities of (M,) classes. `inputs` takes indices in 0..M-1 and returns images."""
    batches = torch.arange(len(classes), device=classes.device).split(BATCH)
    values = [subject.probabilities(inputs(jobs)).gather(1, classes[jobs, None])[:, 0] for jobs in batches]
    return torch.cat(values).double().cpu().numpy()


def _pixel_ranks(maps: Tensor, seed: int) -> Tensor:
    """Return (N, H, W) ranks, 0 for the most salient pixel: by map value, then block, then place in the block."""
    height, width = maps.shape[1:]
    side = max(1, min(height, width) // BLOCKS)
    rows, columns = np.arange(height) // side, np.arange(width) // side
    block = (rows[:, None] * (columns[-1] + 1) + columns).ravel()
    rng = np.random.default_rng(seed)
    # One draw for each image: the order of an image does not depend on the number of later images.
    turns = np.stack([rng.permutation(block[-1] + 1) for _ in maps])
    by_block = torch.from_numpy(turns[:, block].argsort(axis=1, kind="stable")).to(maps.device)
    levels = (maps.flatten(1).float() * LEVELS).round().gather(1, by_block)
    order = by_block.gather(1, levels.argsort(dim=1, descending=True, stable=True))
    return order.argsort(dim=1).reshape(maps.shape)  # the ranks are the inverse of the order


def _blurred(images: Tensor) -> Tensor:
    """Return the images blurred by a Gaussian. At the edges, its weights are scaled so that their sum is 1."""
    sigma = BLUR * min(images.shape[-2:])
    rows, columns = (
        (-((place[:, None] - place) ** 2) / (2 * sigma**2)).softmax(dim=1).to(images)
        for place in (torch.arange(size, dtype=torch.float64) for size in images.shape[-2:])
    )
    return rows @ images @ columns.T
