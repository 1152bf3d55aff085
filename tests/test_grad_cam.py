"""Grad-CAM gives the right map, at the right place, and leaves nothing behind."""

import numpy as np
import pytest
import torch
from narrow_vgg import eval_network
from pytorch_grad_cam import GradCAM as ReferenceGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from cams.maps import scaled
from cams.receptive_fields import Axis
from grad_cam import GradCAM
from inference.explanations import explain
from inference.trained_networks import ModelCard, TrainedNetwork
from networks import build_network

SIZE = 96
# One network for each design: pooling, shortcuts, concatenation, squeeze-and-excitation, pre-activation.
FAMILIES = ("vgg16", "resnet18", "densenet121", "mobilenet_v3", "convnext_tiny", "resnet56v2")


@pytest.fixture(scope="module", params=FAMILIES)
def network(request):
    return eval_network(request.param, 4)


@pytest.fixture(scope="module")
def resnet():
    return eval_network("resnet18", 4)


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
        # With random weights some maps are empty, so each image is explained for the class with the most evidence.
        classes = cam(images, "all").raw.amax((2, 3)).argmax(1)
        maps = cam(images, classes)
    # The package spreads the cells evenly over the image.
    ours = nn.functional.interpolate(maps.raw, (SIZE, SIZE), mode="bilinear")[:, 0].numpy()
    assert not maps.empty.any()
    targets = [ClassifierOutputTarget(int(index)) for index in classes]
    with ReferenceGradCAM(model=network, target_layers=[network.get_submodule(network.cam_layer)]) as reference:
        theirs = reference(input_tensor=images, targets=targets)
    assert np.abs(min_max(ours) - min_max(theirs)).max() < 1e-5


def test_map_before_pooling_and_a_linear_head_is_the_class_activation_map(resnet, images):
    # Zhou et al. 2016: with global average pooling, Σ_k w_ck A_k / (h w).
    recorded = {}
    handle = resnet.layer4.register_forward_hook(lambda m, i, o: recorded.update(a=o))
    with torch.no_grad():
        logits = resnet(images)
    handle.remove()
    activation = recorded["a"]
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


def test_maps_of_a_batch_are_those_of_its_single_images(network, images):
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
                result = cam(images, 0).raw
                torch.testing.assert_close(result, expected)
                assert torch.is_grad_enabled() == (mode is torch.enable_grad)
            assert not result.requires_grad
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
            cam(images[:, :2])  # two channels, which the first convolution refuses
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
    """A network whose ReLU overwrites the activation of the layer before it."""

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
    for layer, result in zip(("layer3", "layer4"), both, strict=False):
        with GradCAM(resnet, layer) as cam:
            alone = cam(images, 1)
        torch.testing.assert_close(result, alone.raw)
        torch.testing.assert_close(alone.logits, logits)


def test_in_place_operations_after_the_layer_change_nothing():
    torch.manual_seed(0)
    overwriting, keeping = InPlace(inplace=True), InPlace(inplace=False)
    keeping.load_state_dict(overwriting.state_dict())
    images = torch.randn(2, 3, 8, 8)
    maps = []
    for model in (overwriting, keeping):
        with GradCAM(model, "conv") as cam:
            maps.append(cam(images, "all").raw)
    torch.testing.assert_close(*maps)
    # The formula by hand: at the convolution's output the gradient is zero where the ReLU gives 0.
    activation = keeping.conv(images).detach()
    alpha = keeping.head.weight[None] * ((activation > 0).float().mean((2, 3)) / 64)[:, None]
    expected = torch.einsum("nck,nkhw->nchw", alpha.detach(), activation).relu()
    torch.testing.assert_close(maps[1], expected, rtol=1e-4, atol=1e-7)


def test_map_without_evidence_is_all_zeros_and_empty(images):
    torch.manual_seed(0)
    model = InPlace(inplace=False)
    with torch.no_grad():
        model.head.weight[0] = -1.0  # everything is evidence against class 0
        model.head.weight[1] = 1.0
    with GradCAM(model, "relu") as cam:
        maps = cam(images, "all")
    assert maps.empty.tolist() == [[True, False]] * 3
    upsampled = maps.upsampled((SIZE, SIZE))
    assert not upsampled[:, 0].any()
    assert upsampled.isfinite().all()
    torch.testing.assert_close(upsampled[:, 1].amax((1, 2)), torch.ones(3))


def test_output_that_is_not_finite_is_an_error(images):
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
    """Return the centre, in the input, of the gradient of one cell of a layer, with all weights positive."""
    recorded = {}
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: recorded.update(o=o))
    image = torch.ones(1, 3, size, size, requires_grad=True)
    model(image)
    handle.remove()
    (gradient,) = torch.autograd.grad(recorded["o"][0, :, cell, cell].sum(), image)
    weight = gradient.abs().sum((0, 1, 2))
    return float((weight * torch.arange(size)).sum() / weight.sum())


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_cells_are_placed_where_their_receptive_fields_are_centred(name):
    torch.manual_seed(0)
    model = build_network(name, 2).eval()
    for module in model.modules():
        # With equal positive weights and average pooling for maximum pooling, the gradient shows the receptive field.
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1.0 / module.weight[0].numel())
    if name == "resnet18":
        model.maxpool = nn.AvgPool2d(3, 2, 1)
    else:
        model.features.pool0 = nn.AvgPool2d(3, 2, 1)
    layer = {"resnet18": "layer2", "densenet121": "features.denseblock2"}[name]
    with GradCAM(model, layer) as cam:
        grid = cam(torch.ones(1, 3, 224, 224)).layers[0].grid
    for cell in (13, 15):
        expected = centre_of_receptive_field(model, layer, cell, 224)
        assert grid.columns.start + cell * grid.columns.step == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        # Strided 3 x 3 convolutions are centred on even pixels, and 2 x 2 pooling between two pixels.
        ("vgg16", Axis(7.5, 16, 64)),
        ("small_cnn", Axis(7.5, 16, 64)),
        ("resnet18", Axis(0, 32, 64)),
        ("resnet50", Axis(0, 32, 64)),
        ("resnet56v2", Axis(0, 8, 64)),
        ("efficientnet_b0", Axis(0, 32, 64)),
        ("mobilenet_v3", Axis(0, 32, 64)),
        ("densenet121", Axis(14, 32, 64)),
        ("convnext_tiny", Axis(15.5, 32, 64)),  # 4 x 4 and 2 x 2 patches that do not overlap
        ("lenet5", Axis(6.5, 2, 64)),  # no padding: 2 + 0.5 + 2 * 2
    ],
)
def test_cells_lie_at_the_centres_of_their_receptive_fields(name, axis):
    with GradCAM(eval_network(name, 2)) as cam:
        assert cam(torch.zeros(1, 3, 64, 64)).layers[0].grid.rows == axis


def test_aligned_map_peaks_at_the_centre_of_its_cell(resnet, images):
    with GradCAM(resnet) as cam:
        maps = cam(images)
    maps.raw[:] = 0
    maps.raw[:, :, 1, 2] = 1
    upsampled = maps.upsampled((SIZE, SIZE))[0, 0]
    rows, columns = torch.nonzero(upsampled == upsampled.max(), as_tuple=True)
    assert set(rows.tolist()) == {32}
    assert columns.min() == 64  # the last column of cells extends to the edge


def test_vgg_needs_no_alignment():
    with GradCAM(eval_network("vgg16", 2)) as cam:
        maps = cam(torch.randn(1, 3, 64, 64))
    for size in ((64, 64), (100, 80)):
        evenly_spread = scaled(nn.functional.interpolate(maps.raw, size, mode="bilinear"))
        torch.testing.assert_close(maps.upsampled(size), evenly_spread, rtol=0, atol=1e-5)


def test_scaled_maps_have_maximum_one():
    maps = torch.rand(5, 2, 4, 4)
    maps[0, 0] = 0
    maxima_one = scaled(maps)
    assert not maxima_one[0, 0].any()
    torch.testing.assert_close(maxima_one[1:].amax((2, 3)), torch.ones(4, 2))


def test_single_logit_has_the_maps_of_the_equivalent_two_class_network(images):
    # The equivalent network has the same trunk and the last layer (-w/2, w/2).
    torch.manual_seed(0)
    single = build_network("small_cnn", 1).eval()
    pair = build_network("small_cnn", 2).eval()
    pair.load_state_dict(
        single.state_dict()
        | {
            f"classifier.fc.{name}": torch.cat([-value, value]) / 2
            for name, value in single.classifier.fc.named_parameters()
        }
    )
    with GradCAM(single) as one, GradCAM(pair) as two:
        result, expected = one(images, "all"), two(images, "all")
        torch.testing.assert_close(one(images).classes, two(images).classes)
    torch.testing.assert_close(result.logits, expected.logits)
    torch.testing.assert_close(result.raw, expected.raw)
    assert (result.raw[:, 0] - result.raw[:, 1]).abs().max() > 0  # the negative class has a map of its own
    with GradCAM(single) as cam, pytest.raises(ValueError, match="classes 0 to 1"):
        cam(images, 2)
    with GradCAM(single, multilabel=True) as cam:  # one finding: its logit is used unchanged
        alone = cam(images, "all")
    torch.testing.assert_close(alone.raw[:, 0], 2 * expected.raw[:, 1])


def trained(seed, *, name="small_cnn", outputs=3, **fields):
    torch.manual_seed(seed)
    values = {
        "architecture": name,
        "classes": ("a", "b", "c"),
        "image_size": 32 + 16 * seed,  # members of an ensemble may differ in it
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "cam_layer": "features.4.relu",
    }
    return TrainedNetwork(build_network(name, outputs).eval(), ModelCard(**(values | fields)))


@pytest.fixture
def xray():
    return np.random.default_rng(0).integers(0, 256, (50, 40), dtype=np.uint8)


def test_explanation_of_an_ensemble_is_the_mean_of_its_members(xray):
    members = [trained(seed) for seed in range(3)]
    together = explain(members, xray)
    alone = [explain(member, xray, "all") for member in members]
    mean = np.mean([one.probabilities for one in alone], axis=0)
    np.testing.assert_allclose(together.probabilities, mean, rtol=1e-5)
    assert together.classes.tolist() == [mean.argmax()]
    maps = np.mean([one.maps[mean.argmax()] for one in alone], axis=0)
    np.testing.assert_allclose(together.maps[0], maps / maps.max(), atol=1e-5)
    assert together.maps.shape == (1, 50, 40)
    for result, expected in zip(explain(members[:1], xray, "all"), alone[0], strict=True):
        np.testing.assert_array_equal(result, expected)


def test_top_of_an_ensemble_is_not_the_top_of_its_first_member(xray):
    biases = ((0.0, 0.1, -9.0), (4.0, 0.0, -9.0))  # the first slightly prefers b, the second strongly prefers a
    members = [trained(seed) for seed in range(2)]
    for member, bias in zip(members, biases, strict=True):
        with torch.no_grad():
            member.network.classifier.fc.weight.mul_(1e-4)
            member.network.classifier.fc.bias.copy_(torch.tensor(bias))
    assert explain(members[0], xray).classes.tolist() == [1]
    assert explain(members, xray).classes.tolist() == [0]


def test_ensemble_of_different_classes_is_refused(xray):
    with pytest.raises(ValueError, match="small_cnn has a, b, c; small_cnn has a, c, b"):
        explain([trained(0), trained(1, classes=("a", "c", "b"))], xray)


def test_multilabel_networks_explain_the_likeliest_finding(xray):
    one = trained(1, multilabel=True, head="sigmoid")
    answer = explain(one, xray)
    with torch.no_grad():
        logits = one.network(one.preprocessing(xray)[None])[0]
    np.testing.assert_allclose(answer.probabilities, logits.sigmoid().numpy(), rtol=1e-4)
    assert answer.classes.tolist() == [int(logits.argmax())]


def test_masked_lungs_are_what_the_network_sees(xray):
    masked = trained(1, lung_masking=True)._replace(lungs=lambda image: np.zeros_like(image))
    whole = trained(1)
    result, blank = explain(masked, xray, "all"), explain(whole, np.zeros_like(xray), "all")
    np.testing.assert_array_equal(result.probabilities, blank.probabilities)
    assert not np.array_equal(result.probabilities, explain(whole, xray).probabilities)
    with pytest.raises(ValueError, match="masked lungs"):
        explain(trained(1, lung_masking=True), xray)
