"""What one run of gen_img_diffusers.py does; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from library.generation.controls import ControlUse
from library.generation.grid_axes import Axis

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which base model and how it computes. `v2`, `v_parameterization` are None where the user said nothing.

    Attributes:
        family: name of the only family that will do; None for any.
        refiner: a second model, for the last steps of every picture.
        compile: compile the U-Net's repeated blocks; adapters should then be merged, see `compiling.CompiledDenoiser`.
        embeddings: files of textual inversion.
        vae_batch_size: pictures that the VAE decodes at the same time; below 1 a share of the batch.
        vae_tiling: let the VAE work on a picture in pieces.
        offload: keep text encoders and VAE in the machine's memory while they do not compute.
    """

    path: str
    family: str | None = None
    vae: str | None = None
    refiner: str | None = None
    v2: bool | None = None
    v_parameterization: bool | None = None
    zero_terminal_snr: bool = False
    precision: Precision = "fp32"
    xformers: bool = False
    channels_last: bool = False
    compile: bool = False
    max_chunks: int = 3
    embeddings: tuple[Path, ...] = ()
    vae_batch_size: float = 1
    vae_tiling: bool = False
    offload: bool = False


@dataclass(frozen=True, kw_only=True)
class NetworkUse:
    """One adapter of the command line, its strength, and the module that reads it."""

    file: Path
    strength: float = 1.0
    module: str = "networks.lora"
    args: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """The adapters of a run.

    Attributes:
        networks: of the command line.
        merged: how many of them, from the first, are merged into the model for good.
        merge_for_batches: have adapters in the weights while pictures want them, where their strengths stay the same.
        folder: where names in tags are looked up; None for nowhere.
        known: files of names in tags, before the folder, as recipes say them.
        tag_style: see `ImageRequest.lora_tag_style`.
        trigger_words: how many of an adapter's trigger words prompts get that have them not; -1 for the trained ones.
        show_metadata: print what the command line's files say of themselves.
    """

    networks: tuple[NetworkUse, ...] = ()
    merged: int = 0
    merge_for_batches: bool = False
    folder: Path | None = None
    known: Mapping[str, Path] = field(default_factory=dict)
    tag_style: str = "sdnext"
    trigger_words: int = 0
    show_metadata: bool = False


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """ControlNets.

    Attributes:
        hints: files and folders of hint images.
    """

    uses: tuple[ControlUse, ...] = ()
    hints: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """What is drawn.

    Attributes:
        prompt, prompt_file, recipes, interactive: where prompts come from.
        settings: fields of `ImageRequest` that prompts do not say; without a size, the base model's own.
        given: those of them that the command line says, which come before what recipes say.
        seed: of the command; None for one of chance.
        images, masks: files and folders to begin from.
        iterations: how often the whole list of prompts is drawn, each time with other seeds.
        same_seed: one seed for all pictures of an iteration.
        shuffled: prompts in another order in each iteration.
        wildcards: folder of word lists.
        compare_base: draw each picture without adapters too.
        axes: of a grid; none for single pictures.
    """

    prompt: str | None = None
    prompt_file: Path | None = None
    recipes: tuple[Path, ...] = ()
    interactive: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    seed: int | None = None
    images: Path | None = None
    masks: Path | None = None
    images_per_prompt: int = 1
    iterations: int = 1
    batch_size: int = 1
    same_seed: bool = False
    shuffled: bool = False
    wildcards: Path | None = None
    compare_base: bool = False
    axes: tuple[Axis, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where pictures go and how they are called.

    Attributes:
        sequential_names: im_000001.png and so on.
        original_names: as the picture that one began from.
        save_first_stage: of pictures in two stages the first one's too.
    """

    folder: Path
    sequential_names: bool = False
    original_names: bool = False
    save_first_stage: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """One run.

    Attributes:
        program: the script's name, for sentences about what is left out.
    """

    program: str
    model: ModelOptions
    pictures: PictureOptions
    output: OutputOptions
    adapters: AdapterOptions = AdapterOptions()
    control: ControlOptions = ControlOptions()
