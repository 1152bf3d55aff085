"""Grad-CAM: the right map, at the right place, and nothing left behind."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM as ReferenceGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from grad_cam import Axis, GradCAM, overlay, scaled
from networks import ARCHITECTURES, build_network

SIZE = 96


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def network(request):
    torch.manual_seed(0)
    return build_network(request.param, 4).eval()


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return build_network("resnet18", 4).eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def min_max(maps):
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    return (maps - low) / (high - low)


def hooks_of(model):
    return [name for name, module in model.named_modules() if module._forward_hooks or module._backward_hooks]


def test_maps_agree_with_the_grad_cam_package(network, images):
    with GradCAM(network) as cam:
        # With random weights some maps are empty: of each image the class with the most evidence.
        classes = cam(images, "all").raw.amax((2, 3)).argmax(1)
        maps = cam(images, classes)
        ours = maps.upsampled((SIZE, SIZE), aligned=False)[:, 0].numpy()
    assert not maps.empty.any()
    targets = [ClassifierOutputTarget(int(index)) for index in classes]
    with ReferenceGradCAM(
        model=network, target_layers=[network.get_submodule(network.cam_layer)]
    ) as reference:
        theirs = reference(input_tensor=images, targets=targets)
    assert np.abs(min_max(ours) - min_max(theirs)).max() < 1e-5


def test_behind_pooling_and_a_linear_head_the_map_is_the_class_activation_map(resnet, images):
    # Zhou et al. 2016: with global average pooling, Σ_k w_ck A_k / (h w).
    kept = {}
    handle = resnet.layer4.register_forward_hook(lambda m, i, o: kept.update(a=o))
    with torch.no_grad():
        logits = resnet(images)
    handle.remove()
    activation = kept["a"]
    area = activation.shape[2] * activation.shape[3]
    expected = (torch.einsum("ck,nkhw->nchw", resnet.fc.weight, activation) / area).relu()
    with GradCAM(resnet) as cam:
        maps = cam(images, "all")
    torch.testing.assert_close(maps.raw, expected.detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(maps.logits, logits)


def test_ways_to_ask_for_classes_agree(resnet, images):
    with GradCAM(resnet) as cam:
        every = cam(images, "all")
        top = cam(images)
        one = cam(images, 2)
        each = cam(images, [3, 1, 0])
        pairs = cam(images, torch.tensor([[0, 1], [2, 3], [1, 1]]))
    predicted = every.logits.argmax(1)
    assert every.raw.shape == (3, 4, 3, 3)
    assert torch.equal(top.classes[:, 0], predicted)
    torch.testing.assert_close(top.raw[:, 0], every.raw[torch.arange(3), predicted])
    torch.testing.assert_close(one.raw[:, 0], every.raw[:, 2])
    torch.testing.assert_close(each.raw[:, 0], every.raw[torch.arange(3), [3, 1, 0]])
    torch.testing.assert_close(pairs.raw[1], every.raw[1, 2:])
    torch.testing.assert_close(pairs.raw[2, 0], pairs.raw[2, 1])


def test_a_batch_is_its_images_one_by_one(network, images):
    with GradCAM(network) as cam:
        together = cam(images, 1).raw
        alone = torch.cat([cam(image[None], 1).raw for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-6)


def test_frozen_networks_and_disabled_gradients_change_nothing(network, images):
    with GradCAM(network) as cam:
        expected = cam(images, 0).raw
    network.requires_grad_(False)
    try:
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode(), GradCAM(network) as cam:
                found = cam(images, 0).raw
                torch.testing.assert_close(found, expected)
                assert torch.is_grad_enabled() == (mode is torch.enable_grad)
            assert not found.requires_grad
    finally:
        network.requires_grad_(True)


def test_nothing_is_left_behind(resnet, images):
    resnet.train()
    resnet.bn1.eval()  # a frozen layer inside a network that trains
    before = {key: value.clone() for key, value in resnet.state_dict().items()}
    modes = [module.training for module in resnet.modules()]
    try:
        with GradCAM(resnet) as cam:
            assert not resnet.training
            cam(images, "all")
        assert [module.training for module in resnet.modules()] == modes
    finally:
        resnet.eval()
    assert hooks_of(resnet) == []
    assert all(parameter.grad is None for parameter in resnet.parameters())
    assert all(torch.equal(before[key], value) for key, value in resnet.state_dict().items())
    assert all(parameter.requires_grad for parameter in resnet.parameters())


def test_existing_gradients_of_parameters_are_untouched(resnet, images):
    resnet.fc.weight.grad = torch.full_like(resnet.fc.weight, 7.0)
    try:
        with GradCAM(resnet) as cam:
            cam(images)
        assert (resnet.fc.weight.grad == 7).all()
    finally:
        resnet.fc.weight.grad = None


def test_hooks_and_modes_are_restored_after_an_exception(resnet, images):
    resnet.train()
    try:
        with pytest.raises(RuntimeError), GradCAM(resnet) as cam:
            cam(images[:, :2])  # two channels: the first convolution refuses
        assert hooks_of(resnet) == []
        assert resnet.training
        assert torch.is_grad_enabled()
    finally:
        resnet.eval()
    with GradCAM(resnet) as cam:
        with pytest.raises(ValueError, match="out of range"):
            cam(images, 4)
        assert cam(images).raw.isfinite().all()  # still usable


def test_trunk_is_not_part_of_any_graph(resnet, images):
    seen = {}
    inside = resnet.layer3.register_forward_hook(lambda m, i, o: seen.update(trunk=o.requires_grad))
    behind = resnet.fc.register_forward_hook(lambda m, i, o: seen.update(head=o.requires_grad))
    with GradCAM(resnet) as cam:
        cam(images)
    inside.remove()
    behind.remove()
    assert seen == {"trunk": False, "head": True}


class InPlace(nn.Module):
    """A network whose rectifier overwrites the activation of the layer before it."""

    def __init__(self, *, inplace):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.relu(self.conv(x)).mean((2, 3)))


def test_two_maps_at_once_and_plain_passes_inside_do_not_disturb_each_other(resnet, images):
    with GradCAM(resnet, "layer3") as three, GradCAM(resnet, "layer4") as four:
        with torch.no_grad():
            logits = resnet(images)
            assert not torch.is_grad_enabled()
        both = [cam(images, 1).raw for cam in (three, four, three)]
    torch.testing.assert_close(both[0], both[2])
    for layer, found in zip(("layer3", "layer4"), both, strict=False):
        with GradCAM(resnet, layer) as cam:
            alone = cam(images, 1)
        torch.testing.assert_close(found, alone.raw)
        torch.testing.assert_close(alone.logits, logits)


def test_operations_in_place_behind_the_layer_change_nothing():
    torch.manual_seed(0)
    overwriting, keeping = InPlace(inplace=True), InPlace(inplace=False)
    keeping.load_state_dict(overwriting.state_dict())
    images = torch.randn(2, 3, 8, 8)
    maps = []
    for model in (overwriting, keeping):
        with GradCAM(model, "conv") as cam:
            maps.append(cam(images, "all").raw)
    torch.testing.assert_close(*maps)
    # At the convolution's output the gradient is zero where the rectifier closes: the formula by hand.
    activation = keeping.conv(images).detach()
    alpha = keeping.head.weight[None] * ((activation > 0).float().mean((2, 3)) / 64)[:, None]
    expected = torch.einsum("nck,nkhw->nchw", alpha.detach(), activation).relu()
    torch.testing.assert_close(maps[1], expected, rtol=1e-4, atol=1e-7)


def test_no_evidence_is_a_map_of_zeros_that_says_so(images):
    torch.manual_seed(0)
    model = InPlace(inplace=False)
    with torch.no_grad():
        model.head.weight[0] = -1.0  # everything speaks against class 0
        model.head.weight[1] = 1.0
    with GradCAM(model, "relu") as cam:
        maps = cam(images, "all")
    assert maps.empty.tolist() == [[True, False]] * 3
    upsampled = maps.upsampled((SIZE, SIZE))
    assert not upsampled[:, 0].any()
    assert upsampled.isfinite().all()
    torch.testing.assert_close(upsampled[:, 1].amax((1, 2)), torch.ones(3))


def test_output_that_is_not_finite_is_an_error_not_a_map(images):
    model = InPlace(inplace=False)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with GradCAM(model, "relu") as cam, pytest.raises(ValueError, match="not finite"):
        cam(images)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (4, "classes 0 to 3"),
        ([0, 1, -1], "classes 0 to 3"),
        ([0, 1], "for 3 images"),
        ([0.5, 1.0, 2.0], "whole numbers"),
        ("best", "'top', 'all'"),
        (np.zeros((3, 2, 2), dtype=int), "for 3 images"),
    ],
)
def test_wrong_classes_are_refused(resnet, images, classes, message):
    with GradCAM(resnet) as cam, pytest.raises(ValueError, match=message):
        cam(images, classes)


def test_wrong_layers_are_refused(resnet, images):
    with pytest.raises(ValueError, match=r"no layer 'layer5'.*layer4\.1\.conv2"):
        GradCAM(resnet, "layer5")
    with pytest.raises(ValueError, match="layer=NAME"):
        GradCAM(nn.Sequential(nn.Conv2d(3, 2, 1)))
    with GradCAM(resnet, "fc") as cam, pytest.raises(ValueError, match="choose a convolution"):
        cam(images)
    with pytest.raises(RuntimeError, match="use `with GradCAM"):
        GradCAM(resnet)(images)
    with GradCAM(resnet) as cam, pytest.raises(ValueError, match="N > 0"):
        cam(images[0])


def centre_of_receptive_field(model, layer, cell, size):
    """Where in the input the gradient of one cell of a layer is centred, weights taken as all positive."""
    kept = {}
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.update(o=o))
    image = torch.ones(1, 3, size, size, requires_grad=True)
    model(image)
    handle.remove()
    (gradient,) = torch.autograd.grad(kept["o"][0, :, cell, cell].sum(), image)
    weight = gradient.abs().sum((0, 1, 2))
    return float((weight * torch.arange(size)).sum() / weight.sum())


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_cells_are_placed_where_their_receptive_fields_are_centred(name):
    torch.manual_seed(0)
    model = build_network(name, 2).eval()
    for module in model.modules():
        # All weights equal and positive, so that the gradient shows the field itself; average for maximum.
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1.0 / module.weight[0].numel())
    if name == "resnet18":
        model.maxpool = nn.AvgPool2d(3, 2, 1)
    else:
        model.features.pool0 = nn.AvgPool2d(3, 2, 1)
    layer = {"resnet18": "layer2", "densenet121": "features.denseblock2"}[name]
    with GradCAM(model, layer) as cam:
        grid = cam(torch.ones(1, 3, 224, 224)).grid
    for cell in (13, 15):
        expected = centre_of_receptive_field(model, layer, cell, 224)
        assert grid.columns.start + cell * grid.columns.step == pytest.approx(expected, abs=0.6)


def test_cells_of_the_three_networks_lie_where_arithmetic_says():
    found = {}
    for name in ARCHITECTURES:
        with GradCAM(build_network(name, 2)) as cam:
            found[name] = cam(torch.zeros(1, 3, 64, 64)).grid.rows
    # Strided convolutions of ResNet look at even pixels; 2 x 2 pooling looks between two.
    assert found == {
        "vgg16": Axis(7.5, 16, 64),
        "resnet18": Axis(0, 32, 64),
        "densenet121": Axis(14, 32, 64),
    }


def test_aligned_map_peaks_at_the_centre_of_its_cell(resnet, images):
    with GradCAM(resnet) as cam:
        maps = cam(images)
    maps.raw[:] = 0
    maps.raw[:, :, 1, 2] = 1
    upsampled = maps.upsampled((SIZE, SIZE))[0, 0]
    rows, columns = torch.nonzero(upsampled == upsampled.max(), as_tuple=True)
    assert set(rows.tolist()) == {32}
    assert columns.min() == 64  # the last column of cells goes on to the edge


def test_vgg_needs_no_alignment():
    torch.manual_seed(0)
    model = build_network("vgg16", 2).eval()
    with GradCAM(model) as cam:
        maps = cam(torch.randn(1, 3, 64, 64))
    for size in ((64, 64), (100, 80)):
        torch.testing.assert_close(
            maps.upsampled(size), maps.upsampled(size, aligned=False), rtol=0, atol=1e-5
        )


def test_scaled_maps_have_maximum_one():
    maps = torch.rand(5, 2, 4, 4)
    maps[0, 0] = 0
    made = scaled(maps)
    assert not made[0, 0].any()
    torch.testing.assert_close(made[1:].amax((2, 3)), torch.ones(4, 2))


def test_overlay_leaves_the_xray_untouched_where_the_map_is_zero():
    rng = np.random.default_rng(0)
    xray = rng.integers(0, 256, (40, 30), dtype=np.uint8)
    map_ = np.zeros((40, 30))
    map_[10:20, 5:15] = np.linspace(0.1, 1, 100).reshape(10, 10)
    colours = overlay(xray, map_, alpha=0.5)
    assert colours.shape == (40, 30, 3)
    np.testing.assert_array_equal(colours[map_ == 0], np.repeat(xray[..., None], 3, 2)[map_ == 0])
    assert (np.ptp(colours[map_ > 0.5].astype(int), axis=1) > 20).all()
    # At the peak, half X-ray and half the colour map's last colour: plasma ends in yellow.
    expected = 0.5 * xray[19, 14] + 0.5 * np.array([240, 249, 33])
    assert np.abs(colours[19, 14] - expected).max() <= 2


def test_overlay_refuses_what_does_not_fit():
    xray = np.zeros((8, 8), np.uint8)
    with pytest.raises(ValueError, match="upsample the map"):
        overlay(xray, np.zeros((4, 4)))
    for bad in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match="divide it by its maximum"):
            overlay(xray, np.full((8, 8), bad))
    with pytest.raises(ValueError, match="choose from autumn"):
        overlay(xray, np.zeros((8, 8)), colormap="rainbows")
