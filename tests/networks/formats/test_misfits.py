"""A layer of a file and one of a network that differ: each difference is one sentence in our words."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from library.errors import UserError
from networks.core.adapter import Adapter
from networks.core.algorithms import algorithm
from networks.formats.files import load_layer
from tests.networks.cases import Case, acting, layer_and_input, new_adapter

TUCKER = {"rank": 2, "use_tucker": True}


def sentence(adapter: Adapter, tensors: Mapping[str, Tensor]) -> str:
    """What loading says; nothing of the adapter has changed by then."""
    with pytest.raises(UserError) as caught:
        load_layer(adapter, dict(tensors), "lora_unet_x", "a.safetensors")
    assert "state_dict" not in str(caught.value)
    assert "size mismatch" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("a.safetensors: lora_unet_x")


@pytest.mark.parametrize(
    ("name", "of_file", "of_network", "layer_name", "expected"),
    [
        (
            "lora",
            {"dora_wd": True},
            {},
            "linear",
            " is LoRA with DoRA per input in the file and LoRA in the network; use --dim_from_weights, or give dora_wd=True",
        ),
        (
            "lora",
            {},
            {"dora_wd": True},
            "linear",
            " is LoRA in the file and LoRA with DoRA per input in the network; "
            "use --dim_from_weights, or leave out dora_wd=True",
        ),
        (
            "loha",
            {"dora_wd": True, "wd_on_output": True},
            {"dora_wd": True},
            "square",
            " is LoHa with DoRA per output in the file and LoHa with DoRA per input in the network; "
            "use --dim_from_weights, or give wd_on_output=True",
        ),
        (
            "loha",
            TUCKER,
            {"rank": 2},
            "conv 3x3",
            " is LoHa with Tucker form in the file and LoHa in the network; use --dim_from_weights, or give use_tucker=True",
        ),
        (
            "lokr",
            {"rank": 2, "factor": 2},
            {"rank": 2, "factor": 4},
            "linear",
            " is LoKr with a full 2 x 2 and a decomposed 12 x 8 factor in the file and "
            "LoKr with a full 4 x 4 and a decomposed 6 x 4 factor in the network; use --dim_from_weights",
        ),
        (
            "lokr",
            {"rank": 2, "factor": 2, "full_matrix": True},
            {"rank": 2, "factor": 2},
            "linear",
            " is LoKr with a full 2 x 2 and a full 12 x 8 factor in the file and "
            "LoKr with a full 2 x 2 and a decomposed 12 x 8 factor in the network; use --dim_from_weights",
        ),
        (
            "lokr",
            TUCKER | {"factor": 2},
            {"rank": 2, "factor": 2},
            "conv 3x3",
            " is LoKr with a full 2 x 2 and a Tucker-decomposed 6 x 4 factor in the file and "
            "LoKr with a full 2 x 2 and a decomposed 6 x 4 factor in the network; use --dim_from_weights",
        ),
        (
            "oft",
            {"rescaled": True},
            {},
            "linear",
            " is OFT with rescale in the file and OFT in the network; use --dim_from_weights, or give rescaled=True",
        ),
        (
            "oft",
            {},
            {"rescaled": True},
            "linear",
            " is OFT in the file and OFT with rescale in the network; use --dim_from_weights, or leave out rescaled=True",
        ),
    ],
)
def test_another_form_is_told_with_what_to_give(name, of_file, of_network, layer_name, expected):
    layer, _ = layer_and_input(layer_name)
    file, adapter = (new_adapter(Case(name, options), layer) for options in (of_file, of_network))
    assert sentence(adapter, acting(file).tensors()) == expected


@pytest.mark.parametrize(("name", "other"), [("lora", {"dora_wd": True}), ("lokr", {"full_matrix": True})])
def test_a_form_is_told_before_a_rank(name, other):
    layer, _ = layer_and_input("linear")
    file = new_adapter(Case(name, other), layer)
    assert " in the file and " in sentence(new_adapter(Case(name, {"rank": 1}), layer), file.tensors())


def test_a_changed_bias_is_told():
    layer, _ = layer_and_input("linear")
    tensors = new_adapter(Case("lora"), layer).tensors() | {"diff_b": torch.ones(24)}
    told = sentence(new_adapter(Case("lora"), layer), tensors)
    assert told == " is LoRA with a change of the bias in the file and LoRA in the network; use --dim_from_weights"


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("dylora", {"lora_down.weight": (4, 15)}, "lora_down.weight is (4, 15), the layer wants (4, 16)"),
        ("lora", {"lora_down.weight": (4, 15)}, "lora_down.weight is (4, 15), the layer wants (4, 16)"),
        ("lora", {"lora_up.weight": (23, 4)}, "lora_up.weight is (23, 4), the layer wants (24, 4)"),
        (
            "lora",
            {"lora_down.weight": (4, 15), "lora_up.weight": (23, 4)},
            "lora_down.weight is (4, 15), the layer wants (4, 16), lora_up.weight is (23, 4), the layer wants (24, 4)",
        ),
        ("loha", {"hada_w2_b": None}, "hada_w2_b is missing"),
        ("loha", {"hada_w3_b": (2, 2)}, "hada_w3_b does not belong to it"),
        ("lokr", {"strange": (2, 2)}, "strange does not belong to it"),
        ("full", {"diff": (24, 15)}, "diff is (24, 15), the layer wants (24, 16)"),
        ("ia3", {"weight": (23,)}, "weight is (23,), the layer wants (24,)"),
    ],
)
def test_tensors_that_do_not_fit_are_told_by_name(name, change, expected):
    layer, _ = layer_and_input("linear")
    tensors = new_adapter(Case(name), layer).tensors()
    for key, shape in change.items():
        if shape is None:
            del tensors[key]
        else:
            tensors[key] = torch.ones(shape)
    told = sentence(new_adapter(Case(name), layer), tensors)
    assert told == f": does not fit: {expected}"
    with pytest.raises(ValueError, match="^does not fit: "):
        new_adapter(Case(name), layer).load_tensors(tensors)
    assert algorithm(name).adapter.title not in told
