"""A cached run equals an uncached one, whatever happened to files, settings and cache before; only the stale is rebuilt."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import replace

import pytest
import torch

from library.dataset import caches
from library.dataset.batches import TrainingBatches, epoch_addresses, load_batches
from library.dataset.caches import build_latent_cache, encode_posterior
from library.dataset.dataset import scan_dataset
from library.dataset.options import DatasetOptions
from library.errors import UserError
from tests.library.dataset.conftest import noise_image
from tests.library.dataset.test_batches import SEED, draw

SIZES = [(64, 64), (96, 64), (64, 100)]


class CountingVae:
    """Passes everything on and counts the images that are encoded."""

    def __init__(self, vae) -> None:
        self.vae, self.encoded = vae, 0

    def parameters(self):
        return self.vae.parameters()

    def encode(self, pixels):
        self.encoded += len(pixels)
        return self.vae.encode(pixels)


@pytest.fixture
def options(draw_images):
    parent = draw_images("train/1_dog", SIZES).parent
    return DatasetOptions(train_data_dir=parent, resolution="64", cache_latents_to_disk=True)


@pytest.fixture
def folder(options):
    return options.train_data_dir / "1_dog"


def build(options, vae, name: str = "vae a", **more):
    """(dataset, cache, VAE that counted) of a start with these options."""
    counting = CountingVae(vae)
    dataset = scan_dataset(options)
    return dataset, build_latent_cache(dataset, counting, name, **more), counting


def encoded_by(options, vae, name: str = "vae a") -> int:
    """How many posteriors a start has to make; and that the cached batches then equal the uncached ones."""
    dataset, cache, counting = build(options, vae, name)
    encoded = counting.encoded
    for address in epoch_addresses(dataset, 1):
        cached = TrainingBatches(dataset, seed=SEED, draw=draw, latents=cache)[address]
        direct = TrainingBatches(dataset, seed=SEED, draw=draw)[address]
        mean, std = encode_posterior(vae, direct.pixels)
        assert torch.equal(cached.latent_mean, mean)
        assert torch.equal(cached.latent_std, std)
        assert (cached.masks is None and direct.masks is None) or torch.equal(cached.masks, direct.masks)
        assert cached.captions == direct.captions
        assert torch.equal(cached.draws.noise, direct.draws.noise)
        assert cached.pixels is None
    return encoded


@pytest.mark.parametrize("where", [{"cache_latents": True, "cache_latents_to_disk": False}, {}], ids=["memory", "disk"])
@pytest.mark.parametrize(
    "more", [{}, {"flip_aug": True}, {"alpha_mask": True, "flip_aug": True}, {"enable_bucket": True, "min_bucket_reso": 64}]
)
def test_cached_equals_uncached(options, tiny_vae, where, more):
    chosen = replace(options, **where, **more)
    assert encoded_by(chosen, tiny_vae) == 3 * (2 if chosen.flip_aug else 1)


def test_an_unchanged_dataset_is_not_encoded_again(options, tiny_vae):
    assert encoded_by(options, tiny_vae) == 3
    assert encoded_by(options, tiny_vae) == 0


def edit(folder):
    noise_image(96, 64, seed=99).save(folder / "001.png")


def edit_keeping_the_time(folder):
    status = os.stat(folder / "001.png")
    edit(folder)
    os.utime(folder / "001.png", ns=(status.st_atime_ns, status.st_mtime_ns))


def swap_names(folder):
    noise_image(64, 64, seed=50).save(folder / "003.png")
    (folder / "000.png").rename(folder / "x")
    (folder / "003.png").rename(folder / "000.png")
    (folder / "x").unlink()


def rename(folder):
    (folder / "001.png").rename(folder / "renamed.png")


def cache_file(folder, image: str):
    (path,) = (folder / caches.FOLDER).glob(f"{image}_*.safetensors")
    return path


def truncate(folder):
    path = cache_file(folder, "001.png")
    path.write_bytes(path.read_bytes()[:-10])


def empty(folder):
    cache_file(folder, "001.png").write_bytes(b"")


def remove(folder):
    cache_file(folder, "001.png").unlink()


def flip_a_byte(folder):
    path = cache_file(folder, "001.png")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def take_another_images_entry(folder):
    shutil.copy(cache_file(folder, "000.png"), cache_file(folder, "001.png"))


@pytest.mark.parametrize(
    "change",
    [edit, edit_keeping_the_time, swap_names, rename, truncate, empty, remove, flip_a_byte, take_another_images_entry],
)
def test_only_the_entry_concerned_is_rebuilt_after(options, folder, tiny_vae, change):
    assert encoded_by(options, tiny_vae) == 3
    change(folder)
    assert encoded_by(options, tiny_vae) == 1
    assert encoded_by(options, tiny_vae) == 0


def test_no_flipped_byte_anywhere_in_an_entry_is_ever_read_as_other_latents(options, folder, tiny_vae):
    dataset, cache, _ = build(options, tiny_vae)
    image = dataset.images[1]
    path, right = cache.path(image, False), cache.read(image, False)
    whole = path.read_bytes()
    for place in (*range(0, len(whole) - 2048, 3), *range(len(whole) - 2048, len(whole), 97)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        if not cache.missing([caches._Entry(image, False)], trust=False):
            assert torch.equal(cache.read(image, False).mean, right.mean)
            assert torch.equal(cache.read(image, False).std, right.std)


def touch(folder):
    os.utime(folder / "001.png", ns=(1, 1))


def copy_all(folder):
    for path in sorted(folder.glob("*.png")):
        shutil.copyfile(path, path.with_suffix(".copy"))
        path.with_suffix(".copy").replace(path)


@pytest.mark.parametrize("change", [touch, copy_all])
def test_a_file_with_the_same_content_keeps_its_entry(options, folder, tiny_vae, change):
    assert encoded_by(options, tiny_vae) == 3
    change(folder)
    assert encoded_by(options, tiny_vae) == 0


@pytest.mark.parametrize(
    "more", [{"resolution": "128"}, {"flip_aug": True}, {"alpha_mask": True}, {"resize_interpolation": "nearest"}]
)
def test_other_settings_have_entries_of_their_own_and_the_old_ones_stay(options, tiny_vae, more):
    assert encoded_by(options, tiny_vae) == 3
    assert encoded_by(replace(options, **more), tiny_vae) == 3
    assert encoded_by(options, tiny_vae) == 0


def test_an_entry_under_a_name_that_is_not_its_own_is_rebuilt(options, tiny_vae):
    dataset, cache, _ = build(options, tiny_vae)
    _, other, _ = build(options, tiny_vae, "vae b")
    image = dataset.images[0]
    shutil.copy(other.path(image, False), cache.path(image, False))
    assert encoded_by(options, tiny_vae) == 1


def test_another_vae_or_precision_has_entries_of_its_own(options, tiny_vae, other_vae):
    assert encoded_by(options, tiny_vae, "vae a") == 3
    assert encoded_by(options, other_vae, "vae b") == 3
    *_, counting = build(options, copy.deepcopy(other_vae).bfloat16(), "vae b")
    assert counting.encoded == 3
    assert encoded_by(options, tiny_vae, "vae a") == 0


def test_what_a_killed_run_left_half_written_is_neither_read_nor_kept(options, folder, tiny_vae):
    (folder / caches.FOLDER).mkdir()
    half = folder / caches.FOLDER / ".001.png_abc.safetensors.77.part"
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    assert encoded_by(options, tiny_vae) == 3
    assert not half.exists()


def test_nothing_is_left_beside_the_entries(options, folder, tiny_vae):
    build(options, tiny_vae)
    assert {path.suffix for path in (folder / caches.FOLDER).iterdir()} == {".safetensors"}


def test_skip_cache_check_goes_by_names_alone(options, folder, tiny_vae):
    assert encoded_by(options, tiny_vae) == 3
    edit(folder)
    *_, counting = build(replace(options, skip_cache_check=True), tiny_vae)
    assert counting.encoded == 0


def test_damage_during_a_run_is_named_with_what_to_do(options, folder, tiny_vae):
    dataset, cache, _ = build(options, tiny_vae)
    flip_a_byte(folder)
    with pytest.raises(UserError, match=r"001.png_.*: the cached latents are damaged; delete it and start again"):
        list(load_batches(TrainingBatches(dataset, seed=SEED, draw=draw, latents=cache), epoch_addresses(dataset, 1)))


def test_latents_that_are_not_numbers_are_never_stored(options, folder, tiny_vae):
    class Broken(CountingVae):
        def encode(self, pixels):
            output = super().encode(pixels)
            output.latent_dist.mean[:, 0, 0, 0] = float("nan")
            return output

    with pytest.raises(UserError, match=r"000.png: the VAE gives latents that are not numbers; run the VAE in fp32"):
        build_latent_cache(scan_dataset(options), Broken(tiny_vae), "vae a")
    assert list((folder / caches.FOLDER).glob("*")) == []


def test_processes_share_the_work_on_disk(options, tiny_vae):
    counts = [build(options, tiny_vae, rank=rank, processes=2)[2].encoded for rank in (0, 1)]
    assert counts == [2, 1]
    assert encoded_by(options, tiny_vae) == 0


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_vae_batch_size_changes_no_more_than_rounding(options, tiny_vae, size):
    dataset, cache, _ = build(
        replace(options, vae_batch_size=size, cache_latents=True, cache_latents_to_disk=False), tiny_vae
    )
    _, alone, _ = build(replace(options, cache_latents=True, cache_latents_to_disk=False), tiny_vae)
    for image in dataset.images:
        torch.testing.assert_close(cache.read(image, False).mean, alone.read(image, False).mean, rtol=1e-4, atol=1e-5)


def break_after_the_scan(options):
    dataset = scan_dataset(options)
    (options.train_data_dir / "1_dog" / "001.png").write_bytes(b"broken")
    return dataset


@pytest.mark.parametrize("where", [{"cache_latents": True, "cache_latents_to_disk": False}, {}], ids=["memory", "disk"])
def test_an_image_that_cannot_be_decoded_stops_or_is_skipped_as_chosen(options, tiny_vae, where):
    chosen = replace(options, **where)
    with pytest.raises(UserError, match=r"001.png: is not an image"):
        build_latent_cache(break_after_the_scan(chosen), tiny_vae, "vae a")
    noise_image(96, 64, seed=1).save(options.train_data_dir / "1_dog" / "001.png")
    dataset = break_after_the_scan(replace(chosen, on_bad_image="skip"))
    lines: list[str] = []
    cache = build_latent_cache(dataset, tiny_vae, "vae a", say=lines.append)
    assert any("left out:" in line and "001.png: is not an image" in line for line in lines)
    batches = list(load_batches(TrainingBatches(dataset, seed=SEED, draw=draw, latents=cache), epoch_addresses(dataset, 1)))
    assert sum(batch.real.sum().item() for batch in batches) == 2
    assert sum(batch.loss_weights.sum().item() for batch in batches) == 2
    left = dataset.without(cache.bad_images.items())
    (address, *_) = addresses = epoch_addresses(left, 1)
    assert len(addresses) == len(left.images) == 2
    assert [path.name for path, _ in left.bad_images] == ["001.png"]
    assert TrainingBatches(left, seed=SEED, draw=draw, latents=cache)[address].real.all()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_a_sentence_before_anything_is_encoded(options, folder, tiny_vae):
    folder.chmod(0o555)
    try:
        with pytest.raises(UserError, match="latents cannot be written here; make it writable, or keep latents in memory"):
            build(options, tiny_vae)
    finally:
        folder.chmod(0o755)


def test_a_file_in_the_place_of_the_cache_folder_is_a_sentence(options, folder, tiny_vae):
    (folder / caches.FOLDER).write_text("in the way")
    with pytest.raises(UserError, match="latents cannot be written here"):
        build(options, tiny_vae)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_a_cache_in_memory_as_the_process_itself_does(options, tiny_vae, workers):
    dataset, cache, _ = build(replace(options, cache_latents=True, cache_latents_to_disk=False), tiny_vae)
    batches = TrainingBatches(dataset, seed=SEED, draw=draw, latents=cache)
    for batch in load_batches(batches, epoch_addresses(dataset, 1), workers=workers):
        image = dataset.samples[batch.samples[0]].image
        assert torch.equal(batch.latent_mean[0], cache.read(image, False).mean)


def test_progress_ends_at_the_whole(options, tiny_vae):
    steps: list[tuple[int, int]] = []
    build_latent_cache(scan_dataset(options), tiny_vae, "vae a", progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
