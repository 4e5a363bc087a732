"""A default stands in two places, the table of options and the dataclass it fills: they agree."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest

from library.cli.options import FLAG, all_options
from library.cli.training_options import TRAINING_OPTIONS
from library.dataset.options import DatasetOptions
from library.diffusion.losses import LossOptions
from library.diffusion.noise import NoiseOptions

OPTIONS = all_options(TRAINING_OPTIONS)


@pytest.mark.parametrize("options_class", [DatasetOptions, LossOptions, NoiseOptions])
def test_the_dataclass_has_the_defaults_of_the_command_line(options_class):
    own = {field.name: field.default for field in fields(options_class)}
    assert MISSING not in own.values()
    shown = {name: OPTIONS[name].default for name in own}
    assert own == {name: default or False if OPTIONS[name].type is FLAG else default for name, default in shown.items()}
