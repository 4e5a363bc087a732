"""Fixtures shared by all tests; models are built once per session and must not be written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.families.family import V_PREDICTION
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from tests.support.tiny_models import build_tiny_folder


@pytest.fixture(scope="session")
def tiny_sd1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny SD1 model that predicts the noise."""
    return build_tiny_folder(tmp_path_factory.mktemp("models") / "tiny_sd1", SD1)


@pytest.fixture(scope="session")
def tiny_sd2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny SD2 model that predicts the noise."""
    return build_tiny_folder(tmp_path_factory.mktemp("models") / "tiny_sd2", SD2)


@pytest.fixture(scope="session")
def tiny_sd2_v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny SD2 model that predicts v."""
    return build_tiny_folder(tmp_path_factory.mktemp("models") / "tiny_sd2_v", SD2, V_PREDICTION)
