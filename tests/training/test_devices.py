"""How a network is computed depends only on the study and the device, and the printed line about it is true."""

import pytest
import torch

from training.devices import autocast_options, described, in_order, resolve_precision

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["with units", "without units"])
def units(request, monkeypatch):
    """Whether the processor reports units for bf16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": request.param})
    return request.param


def test_bf16_is_used_where_the_processor_has_units_for_it_unless_the_study_says_otherwise(units):
    assert resolve_precision("auto", CPU) == ("bf16" if units else "fp32")
    assert [resolve_precision(setting, CPU) for setting in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert [autocast_options(setting, CPU)["enabled"] for setting in ("auto", "fp32", "bf16")] == [units, False, True]


def test_the_printed_line_names_the_precision_and_the_reason(units):
    reason = f"this processor has {'units' if units else 'no units'} for bf16"
    assert described("auto", CPU) == f"{'bf16' if units else 'fp32'}, channels last: {reason}"
    for setting in ("fp32", "bf16"):
        assert described(setting, CPU) == f"{setting}, channels last: the study says so ({reason})"


def test_images_come_in_channels_last_order_and_features_as_they_are():
    images, features = torch.rand(2, 3, 4, 5), torch.rand(2, 7)
    assert in_order(images).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(in_order(images), images)
    assert in_order(features) is features
