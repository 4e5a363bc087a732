"""What `make demo` draws, and the command lines it prints."""

import shlex

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from library.cli.generation import parse_generation
from library.cli.options import all_options, parse
from library.cli.training_options import TRAINING_OPTIONS
from tools.demo import contact_sheet, lettering, loss_curve, run


def picture(colour, caption="a caption", seed=None):
    return contact_sheet.Picture(Image.new("RGB", (64, 64), colour), caption, seed)


def colours(image):
    return {tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3)}


def test_the_sheet_shows_every_generated_picture_and_as_many_training_images_as_fit():
    training = [picture((200, index, 0)) for index in range(5)]
    rows = [contact_sheet.Row(str(row), [picture((row, index, 250), seed="7") for index in range(3)]) for row in range(3)]
    shown = colours(contact_sheet.draw_contact_sheet(training, rows))
    assert {(row, index, 250) for row in range(3) for index in range(3)} <= shown
    assert {(200, index, 0) for index in range(3)} <= shown
    assert (200, 3, 0) not in shown


def test_longer_captions_make_the_sheet_higher_not_cut():
    short = contact_sheet.draw_contact_sheet([picture("red")], [contact_sheet.Row("base", [picture("blue")])])
    long = contact_sheet.draw_contact_sheet(
        [picture("red")], [contact_sheet.Row("base", [picture("blue", "many words " * 20)])]
    )
    assert long.width == short.width
    assert long.height > short.height


def test_pictures_are_read_in_order_with_the_prompt_and_seed_they_carry(tmp_path):
    for number, prompt in ((2, "second"), (1, "first")):
        info = PngImagePlugin.PngInfo()
        info.add_text("prompt", prompt)
        info.add_text("seed", str(number))
        Image.new("RGB", (8, 8)).save(tmp_path / f"im_{number:06}.png", pnginfo=info)
    assert [(shown.caption, shown.seed) for shown in contact_sheet.read_pictures(tmp_path)] == [
        ("first", "1"),
        ("second", "2"),
    ]


def test_training_images_come_with_their_caption_files(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("what it shows\n", encoding="utf-8")
    assert [shown.caption for shown in contact_sheet.read_training_pictures(tmp_path)] == ["what it shows"]


def test_lines_are_no_longer_than_asked_and_lose_no_word():
    text = "a large red star with yellow checks on a black background\nseed 3"
    lines = lettering.wrapped(text, lettering.font(15), 120)
    assert " ".join(lines).split() == text.split()
    assert lines[-1] == "seed 3"
    assert all(lettering.font(15).getlength(line) <= 120 for line in lines)


def test_the_losses_are_those_of_the_newest_log(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for name, values in (("older", [9.0]), ("newer", [0.5, 0.25, 0.125])):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step, value in enumerate(values, start=1):
                writer.add_scalar(loss_curve.LOSS_OF_STEP, value, step)
    losses = loss_curve.read_losses(tmp_path)
    assert list(losses.steps) == [1, 2, 3]
    assert list(losses.values) == [0.5, 0.25, 0.125]
    assert loss_curve.draw_loss_curve(losses).size == (loss_curve.WIDTH, loss_curve.HEIGHT)


def test_a_folder_without_logs_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no TensorBoard event file"):
        loss_curve.read_losses(tmp_path)


def test_the_running_mean_uses_fewer_values_at_the_start():
    assert loss_curve.running_mean([4.0, 2.0, 0.0, 1.0], 2) == [4.0, 3.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("high", "ticks"), [(0.2, [0, 0.05, 0.1, 0.15, 0.2]), (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.0, [0])], ids=str
)
def test_ticks_are_round_numbers(high, ticks):
    assert loss_curve.round_ticks(0, high) == pytest.approx(ticks)


def test_the_training_command_line_uses_options_that_exist():
    words = shlex.split(run.training_step().line())
    arguments = words[words.index("train_network.py") + 1 :]
    arguments = arguments[arguments.index("--dataset_config") :]  # the configuration file before it has its own test
    given = parse(arguments, TRAINING_OPTIONS, description="").explicit
    assert {"dataset_config", "network_module", "output_dir", "logging_dir"} <= given <= set(all_options(TRAINING_OPTIONS))


@pytest.mark.parametrize("strength", [None, *run.STRENGTHS])
def test_the_picture_command_lines_are_accepted(strength):
    step = run.picture_step(strength)
    options = parse_generation(step.command[2:])
    assert str(options.output.folder) == run.picture_folder(strength)
    assert [network.strength for network in options.adapters.networks] == ([] if strength is None else [float(strength)])


def test_the_picture_command_lines_differ_in_the_lora_alone():
    base, half, full = (run.picture_step(strength).command for strength in (None, *run.STRENGTHS))
    assert set(half) ^ set(full) == {"0.5", "1.0", run.picture_folder("0.5"), run.picture_folder("1.0")}
    assert "--network_weights" not in base
    assert base[: base.index("--outdir")] == full[: full.index("--outdir")]


def test_a_failed_step_stops_the_demo_with_its_status(monkeypatch, capsys):
    def failing():
        raise run.StepFailed("step 1 (Train the LoRA) failed", 3)

    monkeypatch.setattr(run, "run_demo", failing)
    assert run.main([]) == 3
    assert capsys.readouterr().err == "demo: step 1 (Train the LoRA) failed\n"
