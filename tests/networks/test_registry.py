"""Names of network modules: ours by every spelling, third parties' as they are, unknown ones with the known."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from library.errors import UserError
from networks import lora, registry


@pytest.mark.parametrize("name", ["networks.lora", "network.lora", "lora"])
def test_our_modules_by_every_spelling(name):
    assert registry.resolve_network_module(name) == "networks.lora"
    assert registry.load_network_module(name) is lora


def test_third_party_modules_pass_through(monkeypatch):
    module = types.ModuleType("their_adapters")
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "their_adapters", module)
    assert registry.resolve_network_module("their_adapters") == "their_adapters"
    with pytest.raises(UserError, match="their_adapters: is not a network module: it has no function create_network"):
        registry.load_network_module("their_adapters")
    module.create_network = lambda: None
    assert registry.load_network_module("their_adapters").module is module


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("networks.lorra", "--network_module networks.lorra: no such module; did you mean networks.lora"),
        ("networks.core", "no such module"),
        ("nowhere.at.all", "--network_module nowhere.at.all: no such module; known are networks.lora"),
        ("", "--network_module: not given; known are networks.lora"),
        ("..", "no such module"),
    ],
)
def test_unknown_names_are_answered_with_the_known(name, sentence):
    with pytest.raises(UserError, match=sentence):
        registry.resolve_network_module(name)


def test_looking_up_a_name_does_not_import_torch():
    code = (
        "import sys; from networks.registry import *; resolve_network_module('network.lora'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_every_module_of_the_table_loads():
    for name in registry.NETWORK_MODULES:
        module = registry.load_network_module(name)
        assert callable(module.create_network_from_weights)
