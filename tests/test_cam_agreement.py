"""The methods of cams/methods.py agree with three libraries: grad-cam, torchcam and captum.

Maps are compared after min-max, at the layer's resolution. grad-cam returns upsampled maps only, so ours are upsampled
for it.
"""

import copy

import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torchcam.methods
from captum.attr import LayerGradCam, LayerGradientXActivation
from narrow_vgg import eval_network
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from grad_cam import GradCAM

SIZE = 64
NETWORKS = ("resnet18", "vgg16", "densenet121")
GRAD_CAM_PACKAGE = {
    "gradcam": pytorch_grad_cam.GradCAM,
    "hirescam": pytorch_grad_cam.HiResCAM,
    "layercam": pytorch_grad_cam.LayerCAM,
    "xgradcam": pytorch_grad_cam.XGradCAM,
    "gradcam++": pytorch_grad_cam.GradCAMPlusPlus,
}
TORCHCAM = {
    "gradcam": torchcam.methods.GradCAM,
    "layercam": torchcam.methods.LayerCAM,
    "xgradcam": torchcam.methods.XGradCAM,
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return eval_network(request.param, 4)


@pytest.fixture(scope="module")
def images():
    # Coarse plus fine noise: maps of fine noise alone are nearly constant, and min-max scaling would enlarge rounding.
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(3, 3, 3, 3, generator=generator)
    coarse = nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
    return 2 * coarse + torch.randn(3, 3, SIZE, SIZE, generator=generator)


def min_max(maps):
    maps = np.asarray(maps, dtype=np.float64)
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    return (maps - low) / (high - low)


def evenly_spread(maps):
    """Return (N, K, SIZE, SIZE) maps, enlarged as in the libraries: the cells are spread evenly over the image."""
    return nn.functional.interpolate(maps, (SIZE, SIZE), mode="bilinear")


def ours(network, images, method, classes=None):
    """Return our maps and their classes. Each class is the one with the most evidence, so that no map is empty."""
    with GradCAM(network, method=method) as cam:
        if classes is None:
            classes = cam(images, "all").raw.amax((2, 3)).argmax(1)
        maps = cam(images, classes)
    assert not maps.empty.any()
    return maps, [int(index) for index in classes]


def from_grad_cam_package(network, images, kind, classes):
    targets = [ClassifierOutputTarget(index) for index in classes]
    with kind(model=network, target_layers=[network.get_submodule(network.cam_layer)]) as cam:
        return cam(input_tensor=images, targets=targets)


def from_torchcam(network, images, kind, classes):
    with kind(network, network.cam_layer) as cam:
        images = images.clone().requires_grad_()
        scores = network(images)
        return cam(classes, scores, normalized=False)[0].numpy()


def scaled_head(network, factor):
    """Return a copy of the network with logits `factor` times as high."""
    larger = copy.deepcopy(network)
    last = [module for module in larger.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(factor)
        last.bias.mul_(factor)
    return larger


@pytest.mark.parametrize("method", ["hirescam", "layercam", "xgradcam"])  # Grad-CAM itself: test_grad_cam.py
def test_maps_agree_with_the_grad_cam_package(network, images, method):
    maps, classes = ours(network, images, method)
    upsampled = evenly_spread(maps.raw)[:, 0].numpy()
    theirs = from_grad_cam_package(network, images, GRAD_CAM_PACKAGE[method], classes)
    assert np.abs(min_max(upsampled) - min_max(theirs)).max() < 1e-5


@pytest.mark.parametrize("method", ["gradcam", "layercam", "xgradcam"])
def test_maps_agree_with_torchcam(network, images, method):
    maps, classes = ours(network, images, method)
    theirs = from_torchcam(network, images, TORCHCAM[method], classes)
    assert np.abs(min_max(maps.raw[:, 0]) - min_max(theirs)).max() < 1e-5


def test_maps_agree_with_captum(network, images):
    layer = network.get_submodule(network.cam_layer)
    maps, classes = ours(network, images, "gradcam")
    theirs = LayerGradCam(network, layer).attribute(images, target=classes, relu_attributions=True)
    assert np.abs(min_max(maps.raw[:, 0]) - min_max(theirs[:, 0].detach())).max() < 1e-5
    maps, classes = ours(network, images, "hirescam")
    product = LayerGradientXActivation(network, layer).attribute(images, target=classes)
    theirs = product.sum(dim=1).relu().detach()  # HiResCAM is gradient times activation, summed over channels
    assert np.abs(min_max(maps.raw[:, 0]) - min_max(theirs)).max() < 1e-5


def activation_and_gradient(network, images, classes):
    """Return (N, K, h, w) A and G at the network's layer, in double precision, from a plain backward pass."""
    double, recorded = copy.deepcopy(network).double(), {}
    hook = double.get_submodule(network.cam_layer).register_forward_hook(
        lambda module, inputs, output: recorded.update(a=output) or output.clone()
    )
    logits = double(images.double())
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(images)), classes].sum(), recorded["a"])
    return recorded["a"].detach(), gradient


def grad_cam_plus_plus(network, images, classes):
    """Return Grad-CAM++ maps computed directly from the formula of the paper."""
    a, g = activation_and_gradient(network, images, classes)
    below = 2 * g**2 + g**3 * a.sum((2, 3), keepdim=True)
    alpha = torch.where(g != 0, g**2 / below, 0)
    weights = (alpha * g.relu()).sum((2, 3), keepdim=True)
    return (weights * a).sum(1).relu()


def test_grad_cam_plus_plus_follows_its_formula_without_an_epsilon(network, images):
    # grad-cam adds 1e-6 to a denominator of the size of the squared gradient, which is about 1e-6 before pooling. The
    # formula needs no epsilon.
    maps, classes = ours(network, images, "gradcam++")
    expected = min_max(grad_cam_plus_plus(network, images, classes))
    assert np.abs(min_max(maps.raw[:, 0]) - expected).max() < 1e-5
    # With very high logits the epsilon has no influence, and grad-cam agrees.
    larger = scaled_head(network, 1e5)
    maps, classes = ours(larger, images, "gradcam++")
    upsampled = evenly_spread(maps.raw)[:, 0].numpy()
    theirs = from_grad_cam_package(larger, images, GRAD_CAM_PACKAGE["gradcam++"], classes)
    assert np.abs(min_max(upsampled) - min_max(theirs)).max() < 1e-5


def test_grad_cam_plus_plus_of_torchcam_lacks_the_denominator(network, images):
    # torchcam 0.5 divides a copy and then does not use it, so its α is G² alone.
    maps, classes = ours(network, images, "gradcam++")
    theirs = min_max(from_torchcam(network, images, torchcam.methods.GradCAMpp, classes))
    assert np.abs(min_max(maps.raw[:, 0]) - theirs).max() > 1e-3
    activation, gradient = activation_and_gradient(network, images, classes)
    weights = (gradient**2 * gradient.relu()).sum((2, 3), keepdim=True)
    assert np.abs(min_max((weights * activation).sum(1).relu()) - theirs).max() < 1e-4


def test_eigen_cam_is_the_first_singular_vector_uncentred(network, images):
    # grad-cam centres the activations first and does not choose the sign, so its map is often negative. The paper does
    # not centre. If no activation is negative, all entries of the vector have the same sign.
    with GradCAM(network, method="eigencam") as cam:
        result = cam(images, "all")
    activations, _ = activation_and_gradient(network, images, [0] * len(images))
    for maps, one in zip(result.raw.numpy(), activations.numpy(), strict=True):
        matrix = one.reshape(len(one), -1).T
        _, _, vectors = np.linalg.svd(matrix, full_matrices=False)
        expected = np.abs(matrix @ vectors[0]).reshape(maps.shape[1:])
        for map_ in maps:  # the same for every class
            np.testing.assert_allclose(map_, expected, rtol=1e-3, atol=1e-4 * expected.max())


class NoPooling(nn.Module):
    """A network whose layer has the input's resolution, so libraries cannot differ in interpolation."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 3)
        self.cam_layer = "features.1"

    def forward(self, x):
        return self.head(self.features(x).amax((2, 3)))


def test_score_cam_agrees_with_both_libraries_where_nothing_is_interpolated():
    # The libraries make masks of channels in different ways: grad-cam upsamples with aligned corners, torchcam scales
    # to 0-1 before it upsamples. The paper and this project scale after upsampling.
    torch.manual_seed(0)
    network = NoPooling().eval()
    images = torch.randn(2, 3, 12, 12)
    maps, classes = ours(network, images, "scorecam")
    theirs = from_grad_cam_package(network, images, pytorch_grad_cam.ScoreCAM, classes)
    assert np.abs(min_max(maps.raw[:, 0]) - min_max(theirs)).max() < 1e-5
    with torchcam.methods.ScoreCAM(network, network.cam_layer) as cam, torch.no_grad():
        network(images)
        theirs = cam(classes, normalized=False)[0]
    assert np.abs(min_max(maps.raw[:, 0]) - min_max(theirs)).max() < 1e-5


def test_layers_are_fused_as_torchcam_fuses_them(images):
    network = eval_network("vgg16", 4)
    layers = ["features.22", "features.29"]
    with GradCAM(network, layers, "layercam") as cam:
        fused = cam(images, 1).upsampled((SIZE, SIZE))[:, 0]  # a VGG's cells are evenly spread (test_grad_cam.py)
    with torchcam.methods.LayerCAM(network, layers) as cam:
        scores = network(images.clone().requires_grad_())
        each = cam(1, scores, normalized=False)
    each = [evenly_spread(one[:, None])[:, 0] for one in each]
    expected = torch.maximum(*[one / one.amax((1, 2), keepdim=True) for one in each])
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-5)
