#!/usr/bin/env python3
"""Make the small text-to-image model that the demo uses, from nothing: drawings, training, check.

    python tools/make_demo_base.py draw vae unet sharpen export check concept --work demo_work

Stages run in the order given, each from what the earlier ones left in the work folder:
  draw     captioned drawings for training
  vae      train the autoencoder, then encode the drawings
  unet     train denoiser and text encoder on the encoded drawings
  sharpen  train the autoencoder's decoder further, latents unchanged
  export   write the model folder (fp16, diffusers layout)
  check    generate from random prompts and count the pictures that show what was asked
  concept  draw the mascot's images and captions, which the model has not seen
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("draw", "vae", "unet", "sharpen", "export", "check", "concept")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stages", nargs="+", choices=STAGES, metavar="stage", help=f"one or more of: {', '.join(STAGES)}")
    add("--work", type=Path, default=Path("demo_work"), help="folder of drawings and checkpoints (default: %(default)s)")
    add("--base", type=Path, default=ROOT / "configs/demo/base", help="the model folder (default: %(default)s)")
    add("--concept_dir", type=Path, default=ROOT / "configs/demo/concept", help="the mascot's images (default: %(default)s)")
    add("--seed", type=int, default=1, help="seed of drawings, training and check (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--processes", type=int, default=1, help="processes that train the denoiser together (default: %(default)s)")
    add("--num_drawings", type=int, default=48_000, help="captioned drawings (default: %(default)s)")
    add("--num_doodles", type=int, default=12_000, help="pictures for the autoencoder alone (default: %(default)s)")
    add("--vae_minutes", type=float, default=24.5, help="time budget of the autoencoder (default: %(default)s)")
    add("--unet_minutes", type=float, default=47.0, help="time budget of the denoiser (default: %(default)s)")
    add("--sharpen_minutes", type=float, default=8.0, help="time budget of the decoder alone (default: %(default)s)")
    add("--num_checked", type=int, default=100, help="prompts that the check generates (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    sys.path.insert(0, str(ROOT))
    from library.quiet import quiet_libraries

    quiet_libraries()
    from tools.demo import stages  # torch is imported behind this line, not by --help

    settings = {name: value for name, value in vars(options).items() if name != "stages"}
    return stages.run(options.stages, stages.Settings(**settings))


if __name__ == "__main__":
    sys.exit(main())
