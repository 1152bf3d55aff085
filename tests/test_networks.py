"""Networks are built right, start from the right weights, and are saved and loaded without a change."""

import json
import shutil

import numpy as np
import pytest
import torch
from narrow_vgg import eval_network
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torchvision import models

from architectures.batch_norm_folding import add_batch_norm, fold_batch_norm
from architectures.small_networks import lenet5, resnet_v2
from grad_cam import GradCAM
from inference.trained_networks import (
    ModelCard,
    TrainedNetwork,
    ensemble_card,
    load_network,
    read_card,
    run_folder,
    save_network,
)
from networks import (
    ARCHITECTURES,
    build_network,
    class_logits,
    embeddings,
    parameter_count,
    set_training_mode,
    trunk_features,
)

# Parameters for 1,000 classes as torchvision documents them, and the input width of the last layer.
PUBLISHED = {
    "vgg16": (138_357_544, 4096),
    "vgg19": (143_667_240, 4096),
    "resnet18": (11_689_512, 512),
    "resnet50": (25_557_032, 2048),
    "resnet101": (44_549_160, 2048),
    "densenet121": (7_978_856, 1024),
    "densenet169": (14_149_480, 1664),
    "densenet201": (20_013_928, 1920),
    "efficientnet_b0": (5_288_548, 1280),
    "convnext_tiny": (28_589_128, 768),
    "mobilenet_v3": (5_483_032, 1280),
}


def card(architecture="resnet18", **fields):
    values = {
        "architecture": architecture,
        "classes": ("a", "b", "c"),
        "image_size": 32,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "cam_layer": ARCHITECTURES[architecture].cam_layer,
    }
    return ModelCard(**(values | fields))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one_minus_the_old_head_plus_the_new(name):
    with torch.device("meta"):
        network = build_network(name, 4)
    published, width = PUBLISHED[name]
    assert parameter_count(network) == published - 1000 * (width + 1) + 4 * (width + 1)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_network_has_the_same_output_as_in_torchvision(name):
    torch.manual_seed(0)
    network = build_network(name, 4).eval()
    theirs = models.get_model(name, num_classes=4).eval()
    theirs.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "resnet56v2"])
def test_layer_for_grad_cam_comes_after_the_last_relu(name):
    network = build_network(name, 4).eval()
    recorded = {}
    network.get_submodule(network.cam_layer).register_forward_hook(lambda m, i, o: recorded.update(o=o.clone()))
    with torch.no_grad():
        logits = network(torch.randn(1, 3, 64, 64))
        pooled = recorded["o"].mean((2, 3))
        torch.testing.assert_close(network.get_submodule(ARCHITECTURES[name].head)(pooled), logits)
    assert recorded["o"].min() >= 0


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_cam_layer_of_vgg_is_its_last_relu(name):
    with torch.device("meta"):
        network = build_network(name, 4)
    relus = [name for name, m in network.features.named_modules() if isinstance(m, nn.ReLU)]
    assert network.cam_layer == f"features.{relus[-1]}"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def single_logit(request, tmp_path_factory):
    """Each network with a new head that has one hidden layer and one output, and a folder for it."""
    torch.manual_seed(0)
    network = build_network(request.param, 1, hidden_units=(8,), dropout=0.25)
    folder = tmp_path_factory.mktemp("run")
    yield request.param, network, folder
    shutil.rmtree(folder)  # hundreds of megabytes that pytest would keep


@pytest.mark.slow
def test_every_network_trains_its_head_has_maps_and_is_loaded_unchanged(single_logit):
    name, network, folder = single_logit
    kind = ARCHITECTURES[name]
    images = torch.randn(4, 3, 64, 64)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    set_training_mode(network, trainable="head")
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    functional.binary_cross_entropy_with_logits(network(images)[:, 0], torch.tensor([0.0, 1, 1, 1])).backward()
    optimizer.step()
    changed = {key for key, value in network.state_dict().items() if not torch.equal(before[key], value)}
    assert changed
    assert all(key.startswith(f"{kind.classifier}.") for key in changed)

    with GradCAM(network) as cam:
        maps = cam(images[:2], "all")
    assert maps.raw.shape[:2] == (2, 2)
    assert maps.raw.shape[2:].numel() > 1
    assert maps.raw.isfinite().all()

    written = card(name, classes=("a", "b"), head="sigmoid", hidden_units=(8,), dropout=0.25)
    save_network(folder, network, written)
    loaded = load_network(folder)
    assert loaded.card == written
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(images), network.eval()(images), rtol=0, atol=1e-6)


def test_lenet5_has_the_parameters_of_the_paper_and_no_extra_pooling_at_32_px():
    # 61,706 of the usual form with one channel and 10 classes; two more channels are 2 · 6 · 25 weights.
    network = lenet5(10)
    assert parameter_count(network) == 61_706 + 300
    assert network.features(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 5, 5)


def test_pre_activation_resnet_has_the_depth_and_size_of_the_paper():
    # He et al. 2016, table 4: ResNet-164 has 1.7 million parameters.
    network = resnet_v2(10, n=18)
    weighted = [
        m for key, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in key
    ]
    assert len(weighted) == 164
    assert round(parameter_count(network) / 1e6, 1) == 1.7


def test_pre_activation_block_whose_last_convolution_is_zero_is_the_identity():
    network = resnet_v2(10, n=2).eval()
    block = network.blocks.stage3_2
    nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 256, 4, 4)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("hidden_units", "dropout", "layers"),
    [
        ((), None, ["Linear"]),
        ((), 0.5, ["Dropout", "Linear"]),
        ((16, 8), 0.5, ["Linear", "ReLU", "Linear", "ReLU", "Dropout", "Linear"]),
    ],
)
def test_new_head_has_the_layers_that_were_asked_for(hidden_units, dropout, layers):
    with torch.device("meta"):
        network = build_network("mobilenet_v3", 3, hidden_units=hidden_units, dropout=dropout)
    head = network.get_submodule(network.head_name)
    assert [type(layer).__name__ for layer in head] == layers
    widths = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert widths == list(zip((960, *hidden_units), (*hidden_units, 3), strict=True))
    assert all(layer.p == 0.5 for layer in head if isinstance(layer, nn.Dropout))


def test_dropout_is_refused_for_a_network_without_dropout_layers():
    with torch.device("meta"), pytest.raises(ValueError, match=r"ResNet-18 has no dropout.*hidden_units = \[\]"):
        build_network("resnet18", 3, dropout=0.5)


@pytest.mark.parametrize(("name", "hidden_units"), [("small_cnn", None), ("lenet5", ()), ("lenet5", (8, 7))])
def test_head_of_trunk_features_is_the_network(name, hidden_units):
    torch.manual_seed(0)
    network = build_network(name, 3, hidden_units=hidden_units).eval()
    images = torch.randn(2, 3, 64, 64)
    head = network.get_submodule(network.head_name)
    last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(head(trunk_features(network, images)), expected)
        assert torch.equal(last(embeddings(network, images)), expected)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_pair_from_a_single_logit_has_the_probabilities_and_loss_of_a_sigmoid():
    z = torch.randn(50, 1, dtype=torch.float64) * 10
    pair, positive = class_logits(z), (torch.rand(50) > 0.5).long()
    torch.testing.assert_close(pair.softmax(1)[:, 1:], z.sigmoid())
    torch.testing.assert_close(
        functional.cross_entropy(pair, positive),
        functional.binary_cross_entropy_with_logits(z[:, 0], positive.double()),
    )
    assert torch.equal(pair.argmax(1), (z[:, 0] > 0).long())
    assert class_logits(pair) is pair


def changed_statistics(network):
    """Return the names of the batch normalisations whose statistics change in one forward pass."""
    layers = {key: m for key, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {key: layer.running_mean.clone() for key, layer in layers.items()}
    network(torch.randn(4, 3, 64, 64) + 1)
    return {key for key, layer in layers.items() if not torch.equal(before[key], layer.running_mean)}


def test_training_modes_change_only_the_statistics_and_parameters_that_they_name():
    torch.manual_seed(0)
    network = build_network("small_cnn", 2)
    every = {f"features.{block}.bn" for block in range(5)}
    set_training_mode(network, trainable="head", frozen_batch_norm=False)
    assert changed_statistics(network) == set()
    assert {key for key, p in network.named_parameters() if p.requires_grad} == {
        "classifier.fc.weight",
        "classifier.fc.bias",
    }
    assert not network.classifier.dropout.training  # it comes before the head, `classifier.fc`
    set_training_mode(network, trainable="all", frozen_batch_norm=True)
    assert changed_statistics(network) == set()
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network.classifier.dropout.training
    set_training_mode(network, trainable="all", frozen_batch_norm=False)
    assert changed_statistics(network) == every


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


def old_densenet_name(key):
    for part in ("norm1", "norm2", "conv1", "conv2"):
        key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in key else key
    return key


@pytest.mark.parametrize(
    ("name", "file"), [("resnet18", "resnet18-f37072fd.pth"), ("densenet121", "densenet121-a639ec97.pth")]
)
def test_imagenet_weights_come_from_torchvisions_cache(torch_home, name, file):
    torch.manual_seed(1)
    state = models.get_model(name).state_dict()
    # The published DenseNet file has the module names of torchvision's first versions.
    torch.save({old_densenet_name(key): value for key, value in state.items()}, torch_home / file)
    network = build_network(name, 3, weights="imagenet")
    head = ARCHITECTURES[name].head
    for key, value in network.state_dict().items():
        if not key.startswith(f"{head}."):
            assert torch.equal(value, state[key]), key
    assert network.get_submodule(head).out_features == 3


def test_missing_imagenet_weights_name_file_folder_and_alternatives(torch_home, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(FileNotFoundError) as caught:
        build_network("resnet18", 3, weights="imagenet")
    for part in ("resnet18-f37072fd.pth", str(torch_home), "--weights none", "--weights FILE"):
        assert part in str(caught.value)


def test_imagenet_weights_go_into_the_trunk_under_a_new_head(torch_home):
    state = models.get_model("resnet18").state_dict()
    torch.save(state, torch_home / "resnet18-f37072fd.pth")
    network = build_network("resnet18", 2, weights="imagenet", hidden_units=(8,), dropout=0.1)
    assert torch.equal(network.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    assert [key for key in network.state_dict() if key.startswith("fc.")] == [
        "fc.hidden1.weight",
        "fc.hidden1.bias",
        "fc.last.weight",
        "fc.last.bias",
    ]


def test_network_without_imagenet_weights_names_those_that_have_them():
    with pytest.raises(ValueError, match=r"lenet5 has no ImageNet weights.*--weights none.*choose from vgg16"):
        build_network("lenet5", 3, weights="imagenet")


def test_damaged_cache_is_named_and_pickled_code_is_not_run(torch_home, tmp_path):
    (torch_home / "resnet18-f37072fd.pth").write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"resnet18-f37072fd\.pth is damaged, delete it"):
        build_network("resnet18", 3, weights="imagenet")
    torch.save({"fc.weight": ModelCard}, tmp_path / "code.pth")  # unpickling a class would import code
    with pytest.raises(ValueError, match="holds no readable weights"):
        build_network("resnet18", 3, weights=str(tmp_path / "code.pth"))


def saved(network, path):
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(network.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_file_gives_the_trunk_and_with_a_head_order_also_the_head(tmp_path, suffix):
    torch.manual_seed(0)
    source = build_network("small_cnn", 3)
    path = saved(source, tmp_path / f"w{suffix}")
    same = build_network("small_cnn", 3, weights=path, head_order=(0, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), same.state_dict().values(), strict=True))
    for outputs in (3, 5):
        other = build_network("small_cnn", outputs, weights=path)
        assert torch.equal(other.features[4].conv.weight, source.features[4].conv.weight)
        assert other.classifier.fc.out_features == outputs
        assert not torch.equal(other.classifier.fc.weight[:3], source.classifier.fc.weight)


@pytest.mark.parametrize(
    ("name", "head"), [("resnet18", {}), ("lenet5", {"hidden_units": (8,)}), ("small_cnn", {"dropout": 0.5})]
)
def test_classes_in_another_order_permute_the_logits_and_nothing_else(tmp_path, name, head):
    torch.manual_seed(0)
    source = build_network(name, 3, **head).eval()
    path = saved(source, tmp_path / "w.safetensors")
    turned = build_network(name, 3, weights=path, head_order=(2, 0, 1), **head).eval()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(turned(images), source(images)[:, [2, 0, 1]], rtol=0, atol=0)


def test_swapping_two_classes_changes_the_sign_of_a_single_output(tmp_path):
    torch.manual_seed(0)
    source = build_network("small_cnn", 1).eval()
    path = saved(source, tmp_path / "w.safetensors")
    images = torch.randn(4, 3, 64, 64)
    for order, sign in (((0, 1), 1), ((1, 0), -1)):
        network = build_network("small_cnn", 1, weights=path, head_order=order).eval()
        with torch.no_grad():
            assert torch.equal(network(images), sign * source(images))


def test_weights_file_fits_any_new_head_and_a_kept_head_must_have_the_same_form(tmp_path):
    torch.manual_seed(0)
    heads = {"plain": {}, "hidden": {"hidden_units": (8,)}, "wide": {"hidden_units": (9,)}}
    networks = {key: build_network("small_cnn", 3, **head) for key, head in heads.items()}
    for source, network in networks.items():
        path = saved(network, tmp_path / f"{source}.safetensors")
        for target, head in heads.items():
            built = build_network("small_cnn", 3, weights=path, **head).state_dict()
            assert torch.equal(built["features.1.conv.weight"], network.state_dict()["features.1.conv.weight"])
            if source != target:
                with pytest.raises(ValueError, match="are not of a Small CNN"):
                    build_network("small_cnn", 3, weights=path, head_order=(0, 1, 2), **head)


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(nn.Linear(3, 3).state_dict(), path)
    with pytest.raises(ValueError, match="are not of a ResNet-18"):
        build_network("resnet18", 3, weights=str(path))
    with pytest.raises(FileNotFoundError, match="no weights file"):
        build_network("resnet18", 3, weights=str(tmp_path / "gone.pth"))
    with pytest.raises(ValueError, match="choose from vgg16, vgg19, resnet18"):
        build_network("alexnet", 3)


def test_folded_batch_norm_leaves_an_ordinary_vgg16_with_the_same_outputs():
    network = eval_network("vgg16", 3)
    names = list(network.state_dict())
    add_batch_norm(network)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 13
    for _ in range(3):  # changes the running statistics from 0 and 1
        network.train()(torch.randn(4, 3, 32, 32) * 2 + 1)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network.eval()(images)
        fold_batch_norm(network)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert list(network.state_dict()) == names
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_residual_gain_is_the_scale_at_the_end_of_each_residual_block():
    for gain in (1.0, 0.3):
        network = build_network("resnet18", 3, residual_gain=gain)
        blocks = [module for module in network.modules() if isinstance(module, models.resnet.BasicBlock)]
        assert len(blocks) == 8
        assert all((block.bn2.weight == gain).all() and (block.bn1.weight == 1).all() for block in blocks)
    network = build_network("resnet50", 3, residual_gain=0.3)
    blocks = [module for module in network.modules() if isinstance(module, models.resnet.Bottleneck)]
    assert len(blocks) == 16
    assert all((block.bn3.weight == 0.3).all() and (block.bn2.weight == 1).all() for block in blocks)


def test_loaded_network_equals_the_saved_one_and_is_frozen_and_in_eval_mode(tmp_path):
    torch.manual_seed(0)
    network = build_network("resnet18", 3)
    network(torch.randn(4, 3, 32, 32))  # changes the running statistics, which must be saved too
    written = card(temperature=1.7, thresholds=(0.2, 0.5, 0.3), origin={"seed": 5}, validation={"loss": 0.25})
    save_network(tmp_path / "run", network, written)
    loaded, read, lungs = load_network(tmp_path / "run")
    assert lungs is None
    assert read == written
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), network.eval()(images))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model.json", "model.safetensors"]


def test_probabilities_are_softmax_of_logits_over_temperature():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    expected = np.exp([1.0, 0.5, 0.0]) / np.exp([1.0, 0.5, 0.0]).sum()
    np.testing.assert_allclose(card(temperature=2.0).probabilities(logits)[0].numpy(), expected, rtol=1e-6)


def test_probabilities_of_one_logit_and_of_findings_are_sigmoids():
    z = torch.tensor([[2.0], [-1.0]])
    single = card(classes=("no", "yes"), head="sigmoid", temperature=2.0)
    assert single.outputs == 1
    positive = 1 / (1 + np.exp([-1.0, 0.5]))
    np.testing.assert_allclose(single.probabilities(z), np.stack([1 - positive, positive], 1), rtol=1e-6)
    findings = card(multilabel=True, head="sigmoid", temperature=2.0)
    assert findings.outputs == 3
    logits = torch.tensor([[2.0, 0.0, -4.0]])
    np.testing.assert_allclose(findings.probabilities(logits)[0], 1 / (1 + np.exp([-1.0, 0, 2])), rtol=1e-6)
    assert card(classes=("no", "yes")).outputs == 2
    one = card(classes=("effusion",), multilabel=True)
    assert one.probabilities(torch.zeros(2, one.outputs)).tolist() == [[0.5], [0.5]]


def test_threshold_of_class_one_decides_and_without_one_the_highest_probability():
    p1 = torch.rand(200, generator=torch.Generator().manual_seed(0))
    pairs = torch.stack([1 - p1, p1], 1)
    for t in (0.0, 0.03, 0.5, 0.8, 1.0):
        decided = card(classes=("no", "yes"), thresholds=(1 - t, t)).decide(pairs)
        assert torch.equal(decided.bool(), p1 > t)
    assert card().decide(torch.tensor([[0.5, 0.3, 0.2]])).tolist() == [0]


def test_a_finding_is_positive_from_its_threshold_on():
    probabilities = torch.tensor([[0.1, 0.5, 0.7], [0.3, 0.2, 0.9]])
    findings = card(multilabel=True)
    assert findings.decide(probabilities).tolist() == [[False, True, True], [False, False, True]]
    first = card(multilabel=True, thresholds=(float(probabilities[0, 0]), 0.6, 0.8))
    assert first.decide(probabilities).tolist() == [[True, False, False], [True, False, True]]


def test_ensemble_has_the_mean_thresholds_where_all_have_some():
    cards = [card(thresholds=(0.2, 0.4, 0.6)), card("vgg16", thresholds=(0.4, 0.4, 0.2))]
    np.testing.assert_allclose(ensemble_card(cards).thresholds, (0.3, 0.4, 0.4))
    assert ensemble_card([*cards, card()]).thresholds is None
    with pytest.raises(ValueError, match="same order: resnet18 has a, b, c; vgg16 has b, a, c"):
        ensemble_card([card(), card("vgg16", classes=("b", "a", "c"))])
    one, other = ({"origin": {"study": {"name": name}}} for name in ("covid", "pneumonia"))
    with pytest.raises(ValueError, match=r"covid/resnet18 has a, b, c; pneumonia/resnet18 has b, a, c$"):
        ensemble_card([card(**one), card(classes=("b", "a", "c"), **other)])


def test_a_class_without_a_threshold_is_saved_as_valid_json_and_stays_so_in_an_ensemble(tmp_path):
    two = {"classes": ("ill", "well"), "positive": "ill", "thresholds": (0.3, None)}
    save_network(tmp_path, nn.Linear(1, 1), card(**two))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / "model.json").read_text(), parse_constant=refuse)
    read = read_card(tmp_path)
    assert read == card(**two)
    assert read.positive_index == 0
    assert read.decide(torch.tensor([[0.3, 0.7], [0.2, 0.8]])).tolist() == [0, 1]
    both = ensemble_card([read, card(**two | {"thresholds": (0.5, None)})])
    assert both.thresholds == (0.4, None)
    with pytest.raises(ValueError, match="one positive class, not ill and well"):
        ensemble_card([read, card(**two | {"positive": "well", "thresholds": (None, 0.3)})])


def test_positive_class_of_older_runs_is_the_second_one():
    old = card(classes=("ill", "well"), thresholds=(0.7, 0.3))
    assert old.positive_index == 1
    assert old.decide(torch.tensor([[0.65, 0.35], [0.75, 0.25]])).tolist() == [1, 0]
    assert card().positive_index is None
    assert card(classes=("ill", "well"), multilabel=True).positive_index is None


def test_findings_that_could_not_be_learnt_or_decided_have_no_probability_or_decision():
    first = card(multilabel=True, thresholds=(0.5, None, None), unreported=("c",))
    assert first.undecided == ("b",)
    probabilities = first.probabilities(torch.tensor([[2.0, 9.0, 9.0]]))
    assert torch.isnan(probabilities).tolist() == [[False, False, True]]
    assert first.decide(probabilities).tolist() == [[True, False, False]]
    other = card(multilabel=True, thresholds=(0.3, 0.6, 0.6), unreported=("a",))
    both = ensemble_card([first, other])
    assert both.unreported == ("a", "c")
    assert both.thresholds == (0.4, None, None)


def test_network_for_masked_lungs_refuses_whole_images():
    masked = card(lung_masking=True)
    with pytest.raises(ValueError, match="masked lungs: load it with load_network"):
        _ = TrainedNetwork(nn.Identity(), masked).preprocessing

    def upper_half(xray):
        return xray * (np.arange(len(xray)) < len(xray) // 2)[:, None].astype(np.uint8)

    preprocessing = TrainedNetwork(nn.Identity(), masked, upper_half).preprocessing
    resized = preprocessing.resize(np.full((64, 64), 200, np.uint8))
    assert resized[:, :15].min() == 200
    assert resized[:, 17:].max() == 0


@pytest.mark.slow
def test_run_with_masked_lungs_comes_back_with_its_segmenter(tmp_path):
    from lungs.segmentation import LungSegmenter, save_segmenter, unet

    torch.manual_seed(0)
    save_network(tmp_path, build_network("small_cnn", 3), card("small_cnn", lung_masking=True))
    with pytest.raises(FileNotFoundError, match="no lung model in"):
        load_network(tmp_path)
    segmenter = LungSegmenter(unet("mobilenet_v2").eval(), "mobilenet_v2", 64)
    save_segmenter(tmp_path / "lungs", segmenter)
    loaded = load_network(tmp_path)
    assert loaded.lungs.segmenter.fingerprint == segmenter.fingerprint
    assert loaded.preprocessing.lungs is loaded.lungs


def test_older_cards_without_heads_and_thresholds_still_load(tmp_path):
    torch.manual_seed(0)
    network = build_network("resnet18", 3)
    save_network(tmp_path, network, card())
    fields = json.loads((tmp_path / "model.json").read_text())
    del fields["hidden_units"], fields["dropout"]
    (tmp_path / "model.json").write_text(json.dumps(fields))
    assert load_network(tmp_path).card == card()


def test_incomplete_and_damaged_run_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 2"):
        load_network(tmp_path)
    network = build_network("resnet18", 3)
    save_network(tmp_path, network, card())
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00 not tensors")
    with pytest.raises(ValueError, match=r"damaged or not of this model\.json"):
        load_network(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_network(tmp_path)
    for text in ("{", "[]", json.dumps({"architecture": "resnet18"})):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(ValueError, match="not a model card"):
            load_network(tmp_path)


def test_run_folder_is_found_by_study_and_network(tmp_path):
    folder = tmp_path / "demo" / "resnet18"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text("{}")
    assert run_folder("demo/resnet18", tmp_path) == folder
    assert run_folder(folder) == folder
    with pytest.raises(FileNotFoundError, match="there are demo/resnet18"):
        run_folder("demo/vgg16", tmp_path)
