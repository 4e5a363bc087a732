"""Real image files, drawn here, and a VAE small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.dataset import Dataset, scan_dataset
from library.dataset.options import DatasetOptions


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture that no flip, crop or turn leaves the same."""
    values = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def draw_images(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of PNGs with captions: draw_images("dog", [(64, 64), (96, 64)])."""

    def make(name: str, sizes: list[tuple[int, int]], *, captions: str | None = ".txt") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, size in enumerate(sizes):
            noise_image(*size, seed=number).save(folder / f"{number:03d}.png")
            if captions:
                (folder / f"{number:03d}{captions}").write_text(f"picture {number}, tag a, tag b", encoding="utf-8")
        return folder

    return make


@pytest.fixture
def scan_toml(tmp_path: Path) -> Callable[..., Dataset]:
    """Writes a dataset file and scans it: scan_toml(text, cache_latents=True)."""

    def scan(text: str, **options: object) -> Dataset:
        path = tmp_path / "dataset.toml"
        path.write_text(text, encoding="utf-8")
        return scan_dataset(DatasetOptions(dataset_config=path, **options))  # type: ignore[arg-type]

    return scan


@pytest.fixture(scope="session")
def tiny_vae():
    """An untrained AutoencoderKL with eight channels; the same weights in every run."""
    return make_vae(0)


@pytest.fixture(scope="session")
def other_vae():
    return make_vae(1)


def make_vae(seed: int):
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
    ).eval()
