"""Tiny models to hang adapters on, and networks whose weights act."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from library.families.sd1 import SD1
from library.families.sd2 import SD2
from library.families.sdxl import SDXL
from tests.support.tiny_models import POOLED, build_tiny_parts


class Models:
    """A tiny model of one family, with one input for each part."""

    def __init__(self, family) -> None:
        self.family = family
        parts = build_tiny_parts(family)
        self.unet, self.vae = parts["unet"], parts["vae"]
        self.text_encoders = [parts[encoder.part] for encoder in family.text_encoders]
        self.text_encoder = self.text_encoders[0] if len(self.text_encoders) == 1 else self.text_encoders
        for part in parts.values():
            part.requires_grad_(False)
        stream = torch.Generator().manual_seed(5)
        self.latents = torch.randn(2, 4, 16, 16, generator=stream)  # the lowest level has 4 places to attend to
        self.context = torch.randn(2, 7, self.unet.config.cross_attention_dim, generator=stream)
        self.tokens = torch.randint(0, 49000, (2, 12), generator=stream)
        self.added = {"text_embeds": torch.randn(2, POOLED, generator=stream), "time_ids": torch.full((2, 6), 64.0)}

    def picture(self, unet: nn.Module | None = None) -> Tensor:
        added = self.added if self.family.size_conditions else None
        return (unet or self.unet)(self.latents, torch.tensor([10, 500]), self.context, added_cond_kwargs=added).sample

    def text(self, text_encoders: Sequence[nn.Module] | None = None) -> Tensor:
        """What all text encoders make of the tokens, side by side; and the pooled text, where there is one."""
        found = [encoder(self.tokens) for encoder in text_encoders or self.text_encoders]
        pooled = [each.text_embeds.flatten() for each in found if "text_embeds" in each]
        return torch.cat([*(each.last_hidden_state.flatten() for each in found), *pooled])

    def both(self) -> Tensor:
        return torch.cat([self.picture().flatten(), self.text().flatten()])


def _clean(models: Models) -> Iterator[Models]:
    """Hand the models out, and see that they come back as they were."""
    before = {
        name: value.clone() for name, value in models.unet.state_dict().items() if "attn1.to_q" in name or "conv1" in name
    }
    yield models
    for module in [*models.unet.modules(), *(module for each in models.text_encoders for module in each.modules())]:
        module._forward_hooks.clear()
    for name, value in models.unet.state_dict().items():
        assert name not in before or torch.equal(value, before[name]), f"a test left {name} changed"
    for model in (models.unet, *models.text_encoders):
        replaced = [name for name, module in model.named_modules() if _foreign_forward(module)]
        assert not replaced, f"a test left another program's layers on {len(replaced)} modules"


def _foreign_forward(module: nn.Module) -> bool:
    """Whether another program has put its own function in the place of a layer's `forward`."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__self__", None) is not module


@pytest.fixture(scope="session")
def _sd1() -> Models:
    return Models(SD1)


@pytest.fixture(scope="session")
def _sd2() -> Models:
    return Models(SD2)


@pytest.fixture(scope="session")
def _sdxl() -> Models:
    return Models(SDXL)


@pytest.fixture
def sd1(_sd1: Models) -> Iterator[Models]:
    """Tiny SD1, shared by all tests: hooks and weights must be as before afterwards."""
    yield from _clean(_sd1)


@pytest.fixture
def sd2(_sd2: Models) -> Iterator[Models]:
    """Tiny SD2 with linear projections, likewise."""
    yield from _clean(_sd2)


@pytest.fixture
def sdxl(_sdxl: Models) -> Iterator[Models]:
    """Tiny SDXL, likewise."""
    yield from _clean(_sdxl)


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def models(request: pytest.FixtureRequest) -> Models:
    """Each of them in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def perturb() -> Callable[..., nn.Module]:
    """Give every adapter parameter a value that acts; different in every network with another seed."""

    def perturb(network: nn.Module, seed: int = 0, spread: float = 0.15) -> nn.Module:
        stream = torch.Generator().manual_seed(1000 + seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(spread * torch.randn(parameter.shape, generator=stream))
        return network

    return perturb
