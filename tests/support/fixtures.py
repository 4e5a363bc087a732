"""Fixtures shared by all tests; models are built once per session and must not be written to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from library.families.family import V_PREDICTION
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from library.families.sdxl import SDXL
from tests.support.tiny_models import build_tiny_folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the package remembers between runs (hashes) stays out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny SDXL model that predicts the noise."""
    return build_tiny_folder(tmp_path_factory.mktemp("models") / "tiny_sdxl", SDXL)


def _as_single_file(folder: Path) -> Path:
    """The same model as one file in the original layout."""
    from library.checkpoints.base_model import open_base_model
    from library.checkpoints.model_writing import config_metadata, plan_single_file
    from library.checkpoints.tensor_writing import write_tensors

    model = open_base_model(folder)
    planned = plan_single_file(model)
    path = folder.with_suffix(".safetensors")
    write_tensors(path, planned, config_metadata(model, planned))
    return path


@pytest.fixture(scope="session")
def tiny_sd1_file(tiny_sd1_folder: Path) -> Path:
    """The tiny SD1 model as one file in the original layout."""
    return _as_single_file(tiny_sd1_folder)


@pytest.fixture(scope="session")
def tiny_sd2_file(tiny_sd2_folder: Path) -> Path:
    """The tiny SD2 model as one file in the original layout; nothing in it says what it predicts."""
    return _as_single_file(tiny_sd2_folder)


@pytest.fixture(scope="session")
def tiny_sdxl_file(tiny_sdxl_folder: Path) -> Path:
    """The tiny SDXL model as one file in the original layout."""
    return _as_single_file(tiny_sdxl_folder)


@pytest.fixture(scope="session")
def tiny_sd1_lora(tmp_path_factory: pytest.TempPathFactory, tiny_sd1_folder: Path) -> Path:
    """A LoRA for the tiny SD1 model, whose every tensor acts."""
    from tests.support.drawing import write_lora

    return write_lora(tmp_path_factory.mktemp("lora") / "mine.safetensors", tiny_sd1_folder)


@pytest.fixture(scope="module")
def _tokenizers_are_read_once() -> Iterator[None]:
    """Reading CLIP's vocabulary takes longer than drawing; the runs in processes of their own read it all the same."""
    from library.checkpoints import base_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "load_tokenizer", cache(base_model.load_tokenizer))
        yield
