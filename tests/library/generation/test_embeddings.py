"""Pictures with textual inversion embeddings are those of diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from library.conditioning.embeddings import Embedding, add_embeddings
from library.generation.pipeline import Pipeline
from library.generation.requests import ImageRequest
from tests.library.generation.conftest import tiny_models
from tests.library.generation.diffusers_reference import ROUNDING, diffusers_picture
from tests.support.tiny_models import TEXT_WIDTHS


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_pictures_are_those_of_diffusers_own_loading(kind):
    models = tiny_models(kind)
    stream = torch.Generator().manual_seed(0)
    vectors = [torch.randn(3, width, generator=stream) for width, _ in zip(TEXT_WIDTHS, models.text_encoders, strict=False)]
    asked = ImageRequest(
        prompt="a photo of zorbulon in a park", negative_prompt="zorbulon", width=64, height=64, seed=1, steps=3
    )
    plain = diffusers_picture(models, asked)

    def load(pipeline):
        parts = zip(models.family.text_encoders, vectors, strict=True)
        for encoder, own in parts:
            taught = {"text_encoder": getattr(pipeline, encoder.part), "tokenizer": getattr(pipeline, encoder.tokenizer)}
            pipeline.load_textual_inversion({"zorbulon": own}, token="zorbulon", **taught)
        return {}

    expected = diffusers_picture(tiny_models(kind), asked, load)
    add_embeddings(models.texts, [Embedding(name="zorbulon", vectors=tuple(vectors), where="")])
    (picture,) = Pipeline(models).generate([asked])
    assert np.abs(plain - expected).max() > 0.02, "an embedding that does nothing would prove nothing"
    assert np.abs(np.asarray(picture) / 255 - expected).max() <= ROUNDING
