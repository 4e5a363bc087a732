"""The command line of gen_img_diffusers.py: real runs on tiny models, and a sentence for every mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gen_img_diffusers
import sdxl_gen_img
from library.cli.generation import parse_generation
from library.cli.generation_options import GENERATION_OPTIONS
from library.cli.options import FLAG, all_options
from library.families.sd1 import SD1
from library.families.sdxl_refiner import SDXL_REFINER
from library.generation.planning import image_seed
from library.generation.png_info import read_recipe
from networks import lora
from tests.support.drawing import SMALL, draw, pixels, refused, write_lora
from tests.support.tiny_models import build_tiny_folder, build_tiny_parts

ROOT = Path(gen_img_diffusers.__file__).parent
FROZEN = ROOT / "tests" / "library" / "generation" / "gen_img_diffusers_options.txt"
OPTIONS = all_options(GENERATION_OPTIONS)

pytestmark = pytest.mark.usefixtures("_tokenizers_are_read_once")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own."""
    command = [sys.executable, str(ROOT / "gen_img_diffusers.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)


def test_help_answers_without_torch():
    result = run("--help")
    assert result.returncode == 0
    assert "--network_weights" in result.stdout
    check = "import sys, library.cli.generation; assert not {'torch', 'numpy', 'PIL', 'diffusers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_the_options_of_sd_scripts_are_all_there_with_their_types_and_defaults():
    lines = [
        f"{o.name} {'flag' if o.type is FLAG else o.type.__name__}{'*' if o.many else ''} {o.default}"
        for o in OPTIONS.values()
        if not o.extension
    ]
    assert lines == FROZEN.read_text().splitlines()
    assert len(lines) == 79


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.later])
def test_an_option_of_later_is_refused_and_never_ignored(capsys, name):
    option = OPTIONS[name]
    value = [] if option.type is FLAG else ["1"]
    sentences = refused(capsys, "--ckpt", "x", "--prompt", "a", f"--{name}", *value)
    assert sentences == f"gen_img_diffusers: --{name}: is not available yet: {option.later}; leave it out for now\n"


def test_a_real_command_draws_names_and_describes_its_pictures(tiny_sd1_folder, tiny_sd1_lora, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# ours\na red cat --n blurry --d 5\n\na house --l 3 --s 3\n")
    result = run(
        *("--ckpt", tiny_sd1_folder, "--from_file", prompts, "--outdir", tmp_path / "out", "--seed", 7, "--sdpa"),
        *("--network_weights", tiny_sd1_lora, "--network_mul", "0.5", "--n_iter", 2, "--batch_size", 2, *SMALL),
    )
    assert (result.returncode, result.stderr) == (0, "")
    pictures = sorted((tmp_path / "out").iterdir())
    names = [re.fullmatch(r"im_\d{14}_(\d{3})_(\d+)\.png", picture.name).groups() for picture in pictures]
    seeds = [5, image_seed(7, 1), 5, image_seed(7, 3)]
    assert names == [(f"{number:03d}", str(seed)) for number, seed in enumerate(seeds)]
    assert re.search(rf"^{tiny_sd1_lora.name}: \d+ layers matched, 0 unmatched, 0 ignored$", result.stdout, re.MULTILINE)
    assert re.fullmatch(rf"4 pictures in {tmp_path / 'out'} \(\d+\.\d s\)", result.stdout.splitlines()[-1])
    request, made_with = read_recipe(pictures[1])
    assert (request.prompt, request.scale, request.steps, request.seed) == ("a house", 3.0, 3, seeds[1])
    assert (request.width, request.height) == (64, 64)
    assert made_with["model"] == tiny_sd1_folder.name
    (used,) = made_with["networks"]
    assert (used["name"], used["strength"], used["file"]) == ("mine", 0.5, str(tiny_sd1_lora))


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_each_picture_can_be_drawn_again_alone_with_its_seed(tiny_sd1_folder, tmp_path, sampler):
    common = ("--ckpt", tiny_sd1_folder, "--prompt", "a cat --s 3", "--sampler", sampler)
    *_, last = draw(*common, "--outdir", tmp_path / "a", "--seed", 3, "--images_per_prompt", 3, "--batch_size", 3)
    (alone,) = draw(*common, "--outdir", tmp_path / "b", "--seed", read_recipe(last)[0].seed)
    assert np.abs(pixels(alone) - pixels(last)).max() <= 1


def test_without_a_seed_every_command_draws_something_else(tiny_sd1_folder, tmp_path):
    common = ("--ckpt", tiny_sd1_folder, "--prompt", "a cat", "--outdir", tmp_path)
    draw(*common)
    one, other = (read_recipe(path)[0].seed for path in draw(*common))
    assert one != other


@pytest.mark.parametrize("kind", ["tiny_sd2_folder", "tiny_sd2_v_folder"])
def test_stable_diffusion_2_is_found_out_and_drawn(request, tmp_path, kind):
    (picture,) = draw("--ckpt", request.getfixturevalue(kind), "--prompt", "a cat", "--outdir", tmp_path)
    assert pixels(picture).std() > 5


def test_adapters_act_by_their_strength_and_merging_draws_the_same(tiny_sd1_folder, tiny_sd1_lora, tmp_path):
    common = ("--ckpt", tiny_sd1_folder, "--prompt", "a cat --s 3", "--seed", 1)
    network = ("--network_module", "networks.lora", "--network_weights", tiny_sd1_lora)
    commands = {
        "plain": (),
        "zero": (*network, "--network_mul", 0),
        "full": network,
        "merged halves": ("--network_weights", tiny_sd1_lora, tiny_sd1_lora, "--network_mul", 0.5, 0.5, "--network_merge"),
    }
    drawn = {}
    for name, more in commands.items():
        (picture,) = draw(*common, *more, "--outdir", tmp_path / name)
        drawn[name] = pixels(picture)
    assert np.array_equal(drawn["plain"], drawn["zero"])
    assert np.abs(drawn["plain"] - drawn["full"]).mean() > 2
    assert np.abs(drawn["full"] - drawn["merged halves"]).max() <= 1


def test_merging_several_that_depend_on_the_base_draws_the_same(tiny_sd1_folder, tmp_path):
    parts = build_tiny_parts(SD1)
    files = []
    for number, arguments in enumerate(({"dora_wd": True}, {"dora_wd": True, "wd_on_output": True})):
        network = lora.create_network(1.0, 4, 2, None, parts["text_encoder"], parts["unet"], **arguments)
        stream = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
        files.append(tmp_path / f"{number}.safetensors")
        network.save_weights(files[-1], None, {})
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a cat --s 3", "--seed", 1, "--network_weights", *files)
    plain, attached, merged = (
        pixels(draw(*words, "--outdir", tmp_path / name)[0])
        for name, words in (("a", command[:6]), ("b", command), ("c", (*command, "--network_merge")))
    )
    assert np.abs(attached - plain).mean() > 2
    assert np.abs(attached - merged).max() <= 1


def test_sequential_names_go_on_where_the_folder_ends(tiny_sd1_folder, tmp_path):
    (tmp_path / "im_000007.png").touch()
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a", "--outdir", tmp_path, "--sequential_file_name")
    names = [path.name for path in draw(*command, "--images_per_prompt", 2)]
    assert names == ["im_000007.png", "im_000008.png", "im_000009.png"]


def test_bfloat16_works_on_any_machine(tiny_sd1_folder, tmp_path):
    (picture,) = draw("--ckpt", tiny_sd1_folder, "--prompt", "a", "--outdir", tmp_path, "--bf16", "--no_half_vae")
    assert pixels(picture).std() > 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no card")
def test_what_a_processor_cannot_do_is_said(capsys, tiny_sd1_folder, tmp_path):
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a", "--outdir", tmp_path)
    assert "give --bf16" in refused(capsys, *command, "--fp16")
    draw(*command, "--xformers")
    assert "torch's own attention (--sdpa) is used" in capsys.readouterr().out


def test_a_rounded_size_is_said(capsys, tiny_sd1_folder, tmp_path):
    (picture,) = draw("--ckpt", tiny_sd1_folder, "--prompt", "a --s 1", "--outdir", tmp_path, "--W", "71", "--H", "79")
    assert pixels(picture).shape == (72, 64, 3)
    assert "71x79 is rounded down to 64x72" in capsys.readouterr().out


def test_every_mistake_of_the_command_line_is_told_at_once(capsys):
    sentences = refused(
        *(capsys, "--W", -64, "--steps", 0, "--seed", -1, "--fp16", "--bf16", "--network_mul", 1, "--batch_size", 0),
        *("--max_embeddings_multiples", 0),
    ).splitlines()
    assert len(sentences) == 9
    for start in (
        "--ckpt: is missing",
        "no prompt is given",
        "--W -64: is out of range",
        "--fp16 --bf16: are two precisions",
    ):
        assert any(sentence.startswith(f"gen_img_diffusers: {start}") for sentence in sentences), start


def test_every_mistake_in_files_and_folders_is_told_at_once_before_anything_is_loaded(capsys, tmp_path):
    (tmp_path / "file").touch()
    sentences = refused(
        *(
            capsys,
            "--ckpt",
            tmp_path / "none",
            "--outdir",
            tmp_path / "file",
            "--network_weights",
            tmp_path / "no.safetensors",
        ),
        *("--from_file", tmp_path / "no.txt"),
    )
    assert len(sentences.splitlines()) == 4
    for name in ("none", "file", "no.safetensors", "no.txt"):
        assert str(tmp_path / name) in sentences


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--sampler", "eulera"), "did you mean euler"),
        (("--network_module", "networks.lroa"), "did you mean networks.lora or "),
        (("--network_mul", 1, 2), "--network_mul 1.0 2.0: 2 for 1 adapters"),
        (("--network_args", "rank"), "'rank' has no value; write key=value"),
        (("--scale", "nan"), "--scale: 'nan' is not a finite number"),
        (("--promt", "a"), "did you mean prompt"),
        (("--clip_skip", 4), "--clip_skip 4: the text encoder has 3 layers; give 1 to 3"),
        (("--v2",), "leave out --v2"),
        (("--v_parameterization",), "leave out --v_parameterization"),
    ],
)
def test_what_is_wrong_is_answered_with_what_is_right(capsys, tiny_sd1_folder, tiny_sd1_lora, tmp_path, more, sentence):
    common = ("--ckpt", tiny_sd1_folder, "--prompt", "a", "--outdir", tmp_path, "--network_weights", tiny_sd1_lora)
    assert sentence in refused(capsys, *common, *more)


def test_an_adapter_of_another_family_is_refused_by_name(capsys, tiny_sd1_folder, tiny_sd2_folder, tmp_path):
    file = write_lora(tmp_path / "sd2.safetensors", tiny_sd2_folder, {"ss_base_model_version": "sd_v2"})
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a", "--outdir", tmp_path, "--network_weights", file)
    assert "is an adapter for Stable Diffusion 2.x, and the base model is Stable Diffusion 1.x" in refused(capsys, *command)


def test_an_adapter_that_does_not_fit_is_refused_even_if_it_says_nothing(capsys, tiny_sd1_folder, tiny_sd2_folder, tmp_path):
    file = write_lora(tmp_path / "sd2.safetensors", tiny_sd2_folder)
    command = ("--ckpt", tiny_sd1_folder, "--prompt", "a", "--outdir", tmp_path, "--network_weights", file)
    assert str(file) in refused(capsys, *command, *SMALL)


def test_an_adapter_with_values_that_are_not_finite_is_refused_by_tensor(capsys, tiny_sd1_folder, tiny_sd1_lora, tmp_path):
    tensors = load_file(tiny_sd1_lora)
    key = next(key for key in tensors if "lora_up" in key)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, tmp_path / "bad.safetensors")
    files = ("--network_weights", tmp_path / "bad.safetensors", "--outdir", tmp_path / "out")
    said = refused(capsys, "--ckpt", tiny_sd1_folder, "--prompt", "a", *files, *SMALL)
    assert f"bad.safetensors: has values that are not finite in 1 of its {len(tensors)} tensors ({key})" in said
    assert not list((tmp_path / "out").iterdir())


def test_what_is_no_base_model_is_refused_by_name(capsys, tiny_sd1_lora, tmp_path):
    common = ("--prompt", "a", "--outdir", tmp_path / "out", "--ckpt")
    assert "is an adapter (LoRA) file, not a base model" in refused(capsys, *common, tiny_sd1_lora)
    flux = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(1)}, flux)
    assert "is a FLUX checkpoint" in refused(capsys, *common, flux)


@pytest.fixture(scope="module")
def refiner(tmp_path_factory):
    return build_tiny_folder(tmp_path_factory.mktemp("refiner") / "tiny_refiner", SDXL_REFINER)


def test_sdxl_is_drawn_from_a_file_with_its_refiner_and_again_from_its_recipe(tiny_sdxl_file, refiner, tmp_path):
    told = "a red cat --n blurry --ow 512 --oh 256 --ct 8 --p2 oil painting --d 3"
    given = ("--ckpt", tiny_sdxl_file, "--prompt", told, "--steps", "4", "--outdir")
    assert sdxl_gen_img.main(list(map(str, (*given, tmp_path / "base")))) == 0
    (base,) = (tmp_path / "base").glob("*.png")
    assert pixels(base).shape == (64, 64, 3), "the model's own size"
    (refined,) = draw(*given, tmp_path / "refined", "--refiner", refiner, "--refiner_start", "0.5")
    assert np.abs(pixels(base) - pixels(refined)).mean() > 1
    (again,) = draw("--from_png", refined, "--outdir", tmp_path / "again")
    assert np.array_equal(pixels(again), pixels(refined))
    recipe, _ = read_recipe(refined)
    assert (recipe.original_width, recipe.crop_top, recipe.prompt_2) == (512, 8, "oil painting")


def test_each_model_has_its_place(capsys, tiny_sd1_folder, tiny_sdxl_folder, refiner, tmp_path):
    common = ("--prompt", "a", "--outdir", tmp_path / "out", "--ckpt")
    assert "tiny_refiner: is Stable Diffusion XL's refiner; give a model that draws from noise" in refused(
        capsys, *common, refiner
    )
    assert "is Stable Diffusion XL; give a refiner" in refused(
        capsys, *common, tiny_sdxl_folder, "--refiner", tiny_sdxl_folder
    )
    said = refused(capsys, *common, tiny_sd1_folder, "--refiner", refiner)
    assert "is Stable Diffusion XL's refiner, and the base model is Stable Diffusion 1.x; leave it out" in said
    assert sdxl_gen_img.main(list(map(str, (*common, tiny_sd1_folder)))) == 2
    said = "belongs to Stable Diffusion 1.x, and this script is for Stable Diffusion XL only; use the one without sdxl_"
    assert f"sdxl_gen_img: {tiny_sd1_folder}: {said}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_options_become_what_they_say():
    options = parse_generation(
        ["--ckpt", "m", "--prompt", "a", "--network_weights", "1", "2", "--network_mul", "0.5"]
        + ["--network_args", "a=1;b=2", "--network_merge", "--clip_skip", "2", "--max_embeddings_multiples", "2", "--v2"]
    )
    first, second = options.adapters.networks
    assert (first.strength, second.strength) == (0.5, 1.0)
    assert (first.args, second.args) == ({"a": "1", "b": "2"}, {})
    assert (options.pictures.settings["clip_skip"], options.model.max_chunks, options.model.v2) == (2, 2, True)
    assert options.adapters.merged == 2
