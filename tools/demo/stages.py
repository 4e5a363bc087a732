"""The stages of making the demo model, each from files to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from PIL import Image

from tools.demo import check as checking
from tools.demo import drawings, export, mascot, train_unet, train_vae
from tools.demo.models import write_tokenizer

# Pictures that tell by eye how the autoencoder fares; none of them is trained on.
NUM_SHOWN = 48


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line asked for."""

    work: Path
    base: Path
    concept_dir: Path
    seed: int
    device: str
    threads: int
    processes: int
    num_drawings: int
    num_doodles: int
    vae_minutes: float
    unet_minutes: float
    sharpen_minutes: float
    num_checked: int


def draw(settings: Settings) -> None:
    """Draw the training set into the work folder."""
    pictures, captions = drawings.draw_set(settings.num_drawings, settings.seed)
    np.save(settings.work / "pictures.npy", pictures)
    np.save(settings.work / "doodles.npy", drawings.draw_doodles(settings.num_doodles, settings.seed + 1))
    (settings.work / "captions.json").write_text(json.dumps(captions))
    print(f"{len(captions)} drawings, {len(set(captions))} different captions")


def vae(settings: Settings) -> None:
    """Train the autoencoder, scale its latents, and encode the drawings."""
    work, device = settings.work, torch.device(settings.device)
    pictures = np.load(work / "pictures.npy")
    both = np.concatenate([pictures, np.load(work / "doodles.npy")])
    model = train_vae.train_vae(
        both, checkpoint=work / "vae.pt", minutes=settings.vae_minutes, seed=settings.seed, device=device
    )
    means, spreads = train_vae.normalise_latents(model, *train_vae.encode(model, pictures))
    model.save_pretrained(work / "vae")
    torch.save({"means": means, "spreads": spreads}, work / "latents.pt")
    print(f"latents: mean {means.mean():.3f}, spread {means.std():.3f}, own spread {spreads.mean():.4f}", flush=True)
    show_reconstructions(model, settings, work / "vae.png")


@torch.no_grad()
def show_reconstructions(model: AutoencoderKL, settings: Settings, path: Path) -> None:
    """Save pictures that were not trained on and, under each row, what the autoencoder makes of them."""
    doodles = drawings.draw_doodles(12, settings.seed + 3)
    pictures = np.concatenate([drawings.draw_set(NUM_SHOWN, settings.seed + 2)[0], doodles])
    latents, _ = train_vae.encode(model, pictures)
    decoded = model.decode(latents.to(next(model.parameters()).device)).sample.cpu()
    output = drawings.to_picture(((decoded + 1.0) * 127.5).permute(0, 2, 3, 1).numpy())
    rows = (-1, 1, 12, *pictures.shape[1:])
    pairs = np.concatenate([pictures.reshape(rows), output.reshape(rows)], axis=1)
    Image.fromarray(drawings.contact_sheet(pairs.reshape(-1, *pictures.shape[1:]), 12)).save(path)
    print(f"mean error {np.abs(output.astype(float) - pictures).mean():.2f} of 255; see {path}")


def _encoded_set(settings: Settings) -> tuple[train_unet.EncodedSet, torch.Tensor]:
    """The encoded drawings with their captions' tokens, and the ids of the tokens that occur."""
    tokenizer = write_tokenizer(settings.work / "tokenizer")
    captions = json.loads((settings.work / "captions.json").read_text())
    tokens = train_unet.tokenize(tokenizer, ["", *captions])
    used = train_unet.used_tokens(tokens)
    short = torch.searchsorted(used, tokens)
    latents = torch.load(settings.work / "latents.pt", weights_only=True)
    data = train_unet.EncodedSet(
        means=latents["means"],
        spreads=latents["spreads"],
        tokens=short[1:],
        weights=train_unet.caption_weights(captions),
        empty=short[0],
    )
    return data, used


def unet(settings: Settings) -> None:
    """Train denoiser and text encoder on the encoded drawings."""
    data, used = _encoded_set(settings)
    torch.save({"data": vars(data), "used": used}, settings.work / "encoded_set.pt")
    if settings.processes == 1:
        _train_denoiser(0, settings)
        return
    (settings.work / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(_train_denoiser, args=(settings,), nprocs=settings.processes)


def _train_denoiser(rank: int, settings: Settings) -> None:
    work = settings.work
    if settings.processes > 1:
        # Layers this small keep one thread busy: on two busy cores, two processes were three times as fast as two threads.
        torch.set_num_threads(1)
        address = (work / "rendezvous").resolve().as_uri()
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=settings.processes)
    encoded = torch.load(work / "encoded_set.pt", weights_only=True)
    model = train_unet.train_unet(
        train_unet.EncodedSet(**encoded["data"]),
        vocabulary=len(encoded["used"]),
        checkpoint=work / "unet.pt",
        minutes=settings.unet_minutes,
        seed=settings.seed,
        device=torch.device(settings.device),
    )
    if rank == 0:
        torch.save({"model": model.state_dict(), "used": encoded["used"]}, work / "denoiser.pt")


def sharpen(settings: Settings) -> None:
    """Train the decoder further; the autoencoder of this stage is exported in place of the first."""
    work = settings.work
    model = AutoencoderKL.from_pretrained(work / "vae")
    both = np.concatenate([np.load(work / "pictures.npy"), np.load(work / "doodles.npy")])
    train_vae.sharpen_decoder(
        model,
        both,
        checkpoint=work / "sharpen.pt",
        minutes=settings.sharpen_minutes,
        seed=settings.seed,
        device=torch.device(settings.device),
    )
    model.save_pretrained(work / "vae_sharp")
    show_reconstructions(model, settings, work / "vae_sharp.png")


def export_base(settings: Settings) -> None:
    """Write the model folder from what was trained."""
    trained = torch.load(settings.work / "denoiser.pt", weights_only=True)
    used = trained["used"]
    model = train_unet.Denoiser(len(used))
    model.load_state_dict(trained["model"])
    sharp = settings.work / "vae_sharp"
    autoencoder = AutoencoderKL.from_pretrained(sharp if sharp.is_dir() else settings.work / "vae")
    export.write_base(settings.base, vae=autoencoder, model=model, used=used.long(), seed=settings.seed)
    print(f"{settings.base}: {export.folder_bytes(settings.base) / 1e6:.2f} MB")


def check(settings: Settings) -> None:
    """Generate from random prompts and count what is right."""
    asked = checking.random_answers(settings.num_checked, settings.seed)
    pipeline = checking.load_pipeline(settings.base).to(settings.device)
    pictures = checking.generate(pipeline, [answer.prompt for answer in asked], seed=settings.seed)
    seen = checking.recognise(pictures)
    for wanted, found in zip(asked, seen, strict=True):
        if wanted != found:
            print(f"asked: {wanted.prompt}; seen: {found.prompt}")
    settings.work.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawings.contact_sheet(pictures, 10)).save(settings.work / "check.png")
    right = sum(wanted == found for wanted, found in zip(asked, seen, strict=True))
    print(f"{right} of {len(asked)} right; see {settings.work / 'check.png'}")


def concept(settings: Settings) -> None:
    """Draw the mascot's training images, and the drawings that keep the model's shapes while it learns the mascot."""
    regularisation = settings.concept_dir.with_name("regularisation")
    print(f"{settings.concept_dir}: {mascot.write_concept(settings.concept_dir)} images with captions")
    print(f"{regularisation}: {drawings.write_regularisation(regularisation)} images with captions")


STAGES: dict[str, Callable[[Settings], None]] = {
    "draw": draw,
    "vae": vae,
    "unet": unet,
    "sharpen": sharpen,
    "export": export_base,
    "check": check,
    "concept": concept,
}


def run(names: Sequence[str], settings: Settings) -> int:
    """Run stages in order."""
    torch.set_num_threads(settings.threads)
    settings.work.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"== {name}", flush=True)
        STAGES[name](settings)
    return 0
