"""Batches are a pure function of their address: workers, processes and caching change nothing."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset.batches import Batch, BatchAddress, TrainingBatches, epoch_addresses, load_batches
from library.dataset.caches import build_latent_cache
from library.dataset.dataset import scan_dataset
from library.dataset.images import resize
from library.dataset.options import DatasetOptions
from library.dataset.pixels import draw_flip, draw_reading, face_in_name
from library.diffusion.noise import NoiseOptions, SampleDraws, draw_sample
from library.errors import UserError
from library.families.family import SIZE_CONDITIONS
from tests.library.dataset.conftest import noise_image

SEED = 11
SIZES = [(64, 64), (96, 64), (64, 100), (80, 80), (70, 64)]


def draw(epoch: int, sample: int, latent_shape: tuple[int, int, int]) -> SampleDraws:
    return draw_sample(NoiseOptions(noise_offset=0.1), seed=SEED, epoch=epoch, sample=sample, latent_shape=latent_shape)


def batches_of(dataset, **more) -> TrainingBatches:
    return TrainingBatches(dataset, seed=SEED, draw=draw, **more)


@pytest.fixture
def folder(draw_images):
    return draw_images("train/2_dog", SIZES).parent


@pytest.fixture
def dataset(folder):
    """Everything random that pixels and captions know."""
    return scan_dataset(
        DatasetOptions(
            train_data_dir=folder,
            resolution="64",
            train_batch_size=3,
            flip_aug=True,
            color_aug=True,
            random_crop=True,
            shuffle_caption=True,
            caption_dropout_rate=0.2,
        )
    )


def assert_same(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right), field.name
        elif isinstance(left, SampleDraws):
            for name, value in vars(left).items():
                assert value is None or torch.equal(value, getattr(right, name)), name
        else:
            assert left == right, field.name


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_gives_the_same_batches_bit_for_bit(dataset):
    addresses = [address for epoch in (1, 2) for address in epoch_addresses(dataset, epoch)]
    alone = list(load_batches(batches_of(dataset), addresses))
    assert len(alone) == 2 * dataset.batches_per_epoch()
    for workers in (1, 3):
        for one, other in zip(alone, load_batches(batches_of(dataset), addresses, workers=workers), strict=True):
            assert_same(one, other)


def test_a_run_may_begin_anywhere(dataset):
    last = epoch_addresses(dataset, 2)[-1]
    assert_same(batches_of(dataset)[last], list(load_batches(batches_of(dataset), epoch_addresses(dataset, 2)))[-1])


def test_two_processes_with_half_the_batch_get_the_same_samples_and_draws(folder):
    options = DatasetOptions(train_data_dir=folder, resolution="64", train_batch_size=4, flip_aug=True)
    one, two = scan_dataset(options), scan_dataset(replace(options, train_batch_size=2))
    for address in epoch_addresses(one, 1):
        whole = batches_of(one)[address]
        shares = [batches_of(two, rank=rank, processes=2)[address] for rank in (0, 1)]
        real = torch.cat([share.real for share in shares])
        assert torch.cat([share.pixels for share in shares])[real].equal(whole.pixels)
        assert torch.cat([share.draws.noise for share in shares])[real].equal(whole.draws.noise)
        assert torch.cat([share.draws.timestep for share in shares])[real].equal(whole.draws.timestep)
        assert [name for share in shares for name in share.captions][: len(whole.captions)] == whole.captions
        assert torch.cat([share.loss_weights for share in shares]).sum() == whole.loss_weights.sum()


def test_filling_has_no_weight(folder):
    dataset = scan_dataset(DatasetOptions(train_data_dir=folder, resolution="64", train_batch_size=1))
    for address in epoch_addresses(dataset, 1, processes=3):
        shares = [batches_of(dataset, rank=rank, processes=3)[address] for rank in range(3)]
        assert [share.loss_weights.tolist() for share in shares] == [share.real.float().tolist() for share in shares]
        assert len({share.pixels.shape for share in shares}) == 1


def test_pixels_are_the_image_scaled_cut_and_mirrored(folder):
    dataset = scan_dataset(DatasetOptions(train_data_dir=folder, resolution="64", flip_aug=True))
    flips = []
    for address in epoch_addresses(dataset, 1):
        batch = batches_of(dataset)[address]
        sample = dataset.samples[batch.samples[0]]
        flips.append(draw_flip(dataset, sample, seed=SEED, epoch=1))
        if sample.image.size == (64, 64):
            expected = torch.from_numpy(np.asarray(Image.open(sample.image.path)).copy()).permute(2, 0, 1) / 127.5 - 1
            assert torch.equal(batch.pixels[0], expected.flip(-1) if flips[-1] else expected)
        assert batch.pixels.shape == (1, 3, 64, 64)
        assert batch.pixels.dtype == torch.float32
        assert -1 <= batch.pixels.min() < batch.pixels.max() <= 1
    assert set(flips) == {True, False}


def test_readings_are_spread_as_documented(dataset):
    sample = next(sample for sample in dataset.samples if sample.image.fit.excess[0] > 20)
    readings = [draw_reading(dataset, sample, seed=0, epoch=epoch) for epoch in range(1, 1001)]
    assert sum(reading.flip for reading in readings) / 1000 == pytest.approx(0.5, abs=0.05)
    coloured = [reading for reading in readings if reading.hue_steps is not None or reading.gamma is not None]
    assert len(coloured) / 1000 == pytest.approx(0.33, abs=0.05)
    assert all(abs(reading.hue_steps) <= 8 for reading in coloured if reading.hue_steps is not None)
    assert all(0.95 <= reading.gamma <= 1.05 for reading in coloured if reading.gamma is not None)
    assert {reading.offset[0] for reading in readings} == set(range(sample.image.fit.excess[0] + 1))


def test_switching_one_variation_on_leaves_the_others_as_they_were(folder):
    options = DatasetOptions(train_data_dir=folder, resolution="64", flip_aug=True)
    plain, more = (
        scan_dataset(options),
        scan_dataset(replace(options, random_crop=True, color_aug=True, shuffle_caption=True)),
    )
    for sample in plain.samples:
        assert draw_flip(plain, sample, seed=1, epoch=1) == draw_flip(more, sample, seed=1, epoch=1)


def test_captions_are_processed_per_sample_and_epoch(dataset):
    texts = [{tuple(batches_of(dataset)[BatchAddress(epoch, 0, 0)].captions)} for epoch in (1, 2, 3)]
    assert len(set.union(*texts)) == 3


def test_token_warmup_follows_the_step_of_the_address(folder):
    dataset = scan_dataset(DatasetOptions(train_data_dir=folder, resolution="64", token_warmup_step=0.5))
    batches = batches_of(dataset, max_train_steps=20)
    counts = [len(batches[BatchAddress(1, 0, step)].captions[0].split(",")) for step in (0, 5, 10)]
    assert counts == [1, 2, 3]


def test_addresses_count_steps_over_accumulation_and_epochs(dataset):
    assert dataset.batches_per_epoch() == 4
    steps = [address.step for epoch in (1, 2) for address in epoch_addresses(dataset, epoch, accumulation=3)]
    assert steps == [0, 0, 0, 1, 2, 2, 2, 3]
    assert epoch_addresses(dataset, 2, first=3)[0] == BatchAddress(2, 3, 7)


def test_an_alpha_mask_is_flipped_and_cut_with_its_image_and_others_count_fully(tmp_path):
    folder = tmp_path / "train" / "8_dog"
    folder.mkdir(parents=True)
    image = noise_image(64, 64).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.where(np.arange(64) < 16, 255, 0).astype(np.uint8)[None], 64, 0)))
    image.save(folder / "half.png")
    noise_image(64, 64, seed=5).save(folder / "whole.png")
    options = DatasetOptions(
        train_data_dir=folder.parent, resolution="64", flip_aug=True, alpha_mask=True, train_batch_size=16
    )
    dataset = scan_dataset(options)
    (address,) = epoch_addresses(dataset, 1)
    batch = batches_of(dataset)[address]
    assert batch.masks.shape == (16, 1, 8, 8)
    for index, mask in zip(batch.samples, batch.masks, strict=True):
        sample = dataset.samples[index]
        columns = mask[0, 0].tolist()
        left = [1.0, 1.0, 0, 0, 0, 0, 0, 0]
        flipped = draw_flip(dataset, sample, seed=SEED, epoch=1)
        assert columns == ([1.0] * 8 if sample.image.path.stem == "whole" else left[::-1] if flipped else left)
    assert batches_of(scan_dataset(replace(options, alpha_mask=False)))[address].masks is None


def test_a_face_is_in_the_cut_and_has_the_size_that_was_asked_for(tmp_path):
    folder = tmp_path / "train" / "1_face"
    folder.mkdir(parents=True)
    picture = np.zeros((400, 600, 3), np.uint8)
    picture[80:160, 440:520] = 255
    Image.fromarray(picture).save(folder / "anna_480_120_80_80.png")
    dataset = scan_dataset(DatasetOptions(train_data_dir=folder.parent, resolution="64", face_crop_aug_range="1.5,3"))
    for epoch in range(1, 6):
        (address,) = epoch_addresses(dataset, epoch)
        white = (batches_of(dataset)[address].pixels[0, 0] > 0).sum().item()
        assert (64 / 3.2) ** 2 < white < (64 / 1.4) ** 2
    assert face_in_name("anna_480_120_80_80") == (480, 120, 80, 80)
    assert face_in_name("anna_1_2") is None


SIZES_TOLD = SIZE_CONDITIONS[:6]
"""Original height and width, top and left of the cut, height and width of the target."""


@pytest.mark.parametrize(
    ("size", "told"), [((1000, 1500), [1500, 1000, 256, 0, 1024, 1024]), ((1500, 1000), [1000, 1500, 0, 256, 1024, 1024])]
)
def test_sizes_told_are_the_files_own_the_cut_that_is_made_and_the_bucket(draw_images, size, told):
    folder = draw_images("train/1_dog", [size]).parent
    dataset = scan_dataset(DatasetOptions(train_data_dir=folder, resolution="1024"))
    (batch,) = (batches_of(dataset, size_conditions=SIZES_TOLD)[one] for one in epoch_addresses(dataset, 1))
    assert batch.sizes.tolist() == [told]
    assert batch.sizes.dtype == torch.float32
    (chosen,) = (
        batches_of(dataset, size_conditions=("target_width", "crop_top"))[one] for one in epoch_addresses(dataset, 1)
    )
    assert chosen.sizes.tolist() == [[told[5], told[2]]]


@pytest.mark.parametrize("flip_aug", [False, True])
@pytest.mark.parametrize("random_crop", [False, True])
def test_the_cut_that_is_told_is_where_the_pixels_are(folder, random_crop, flip_aug):
    options = DatasetOptions(train_data_dir=folder, resolution="64", random_crop=random_crop, flip_aug=flip_aug)
    dataset = scan_dataset(options)
    for address in epoch_addresses(dataset, 1):
        batch = batches_of(dataset, size_conditions=SIZES_TOLD)[address]
        image = dataset.samples[batch.samples[0]].image
        height, width, top, left, *target = map(int, batch.sizes[0].tolist())
        assert ((width, height), target) == (image.size, [64, 64])
        whole = resize(np.asarray(Image.open(image.path)), image.fit.resized)
        if draw_flip(dataset, dataset.samples[batch.samples[0]], seed=SEED, epoch=1):
            whole = whole[:, ::-1]
        cut = torch.from_numpy(whole[top : top + 64, left : left + 64].copy()).permute(2, 0, 1) / 127.5 - 1
        assert torch.equal(cut, batch.pixels[0])


def test_cached_latents_tell_the_cut_they_were_made_of_and_none_is_told_where_none_is_asked_for(folder, tiny_vae):
    cached = scan_dataset(DatasetOptions(train_data_dir=folder, resolution="64", flip_aug=True, cache_latents=True))
    latents = build_latent_cache(cached, tiny_vae, "tiny")
    plain = scan_dataset(replace(cached.options, cache_latents=False))
    for address in epoch_addresses(cached, 1):
        told = batches_of(cached, latents=latents, size_conditions=SIZES_TOLD)[address].sizes
        assert torch.equal(told, batches_of(plain, size_conditions=SIZES_TOLD)[address].sizes)
        assert batches_of(plain)[address].sizes is None


@pytest.fixture
def broken_later(folder):
    """A dataset one of whose images breaks after the scan."""

    def make(**options):
        dataset = scan_dataset(DatasetOptions(train_data_dir=folder, resolution="64", train_batch_size=10, **options))
        (folder / "2_dog" / "001.png").write_bytes(b"broken")
        return dataset

    return make


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_stops_the_run_by_name(broken_later, workers):
    dataset = broken_later()
    with pytest.raises(UserError, match=r"001.png: is not an image$"):
        list(load_batches(batches_of(dataset), epoch_addresses(dataset, 1), workers=workers))


def test_an_image_that_breaks_later_has_no_weight_where_bad_images_are_skipped(broken_later):
    dataset = broken_later(on_bad_image="skip")
    (batch,) = load_batches(batches_of(dataset), epoch_addresses(dataset, 1))
    assert batch.real.sum() == batch.loss_weights.sum() == 8
    assert len(batch.skipped) == 2
    assert all("001.png: is not an image" in sentence for sentence in batch.skipped)


def test_an_image_that_changes_its_size_later_is_noticed(folder):
    dataset = scan_dataset(DatasetOptions(train_data_dir=folder, resolution="64"))
    noise_image(65, 64).save(folder / "2_dog" / "000.png")
    with pytest.raises(UserError, match="has changed since the start: it is 65x64 now and was 64x64"):
        list(load_batches(batches_of(dataset), epoch_addresses(dataset, 1)))


def test_every_tensor_of_a_batch_goes_through_map(dataset):
    batch = batches_of(dataset)[BatchAddress(1, 0, 0)]
    doubled = batch.map(lambda tensor: tensor * 2)
    assert torch.equal(doubled.pixels, batch.pixels * 2)
    assert torch.equal(doubled.draws.noise, batch.draws.noise * 2)
    assert doubled.captions == batch.captions
    assert_same(batch.to("cpu"), batch)
