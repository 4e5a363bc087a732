"""Tiny models of each kind, built once, and the pipeline around them."""

from __future__ import annotations

import pytest

from library.checkpoints.tokenizers import shipped_tokenizer
from library.families.family import EPSILON, V_PREDICTION
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from library.families.sdxl import SDXL
from library.families.sdxl_refiner import SDXL_REFINER
from library.generation.pipeline import PipelineModels
from tests.support.tiny_models import build_tiny_parts

KINDS = {"sd1": (SD1, EPSILON), "sd2": (SD2, EPSILON), "sd2 v": (SD2, V_PREDICTION), "sdxl": (SDXL, EPSILON)}
REFINER = "sdxl refiner"


def tiny_models(kind: str) -> PipelineModels:
    family, prediction_type = (SDXL_REFINER, EPSILON) if kind == REFINER else KINDS[kind]
    parts = build_tiny_parts(family)
    return PipelineModels(
        family=family,
        denoiser=parts["unet"],
        vae=parts["vae"],
        text_encoders=[parts[encoder.part] for encoder in family.text_encoders],
        tokenizers=[shipped_tokenizer(encoder) for encoder in family.text_encoders],
        prediction_type=prediction_type,
    )


@pytest.fixture(scope="session")
def sd1_models() -> PipelineModels:
    return tiny_models("sd1")


@pytest.fixture(scope="session", params=KINDS)
def any_models(request) -> PipelineModels:
    return tiny_models(request.param)
