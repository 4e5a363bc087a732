"""What was trained is not lost when a file cannot be written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import UserError
from library.families.sd1 import SD1
from library.training.options import SavingOptions
from library.training.plan import RunLength
from library.training.saving import RunFiles, SavingFailed
from library.training.trainer import Readings, _save

WEIGHTS = {"lora_unet_x.lora_up.weight": torch.ones(2, 2)}


class Network:
    """Writes its one tensor, but to no folder that it is told to fail for."""

    def __init__(self, failing: Path | None = None, weights: dict[str, torch.Tensor] = WEIGHTS) -> None:
        self.failing, self.weights = failing, weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.weights

    def save_weights(self, file: str, dtype: object, metadata: dict[str, str] | None) -> None:
        if Path(file).parent == self.failing:
            raise OSError(28, "No space left on device")
        save_file(self.weights, file, metadata)


def run_files(folder: Path, network: Network, **options: object) -> RunFiles:
    saving = SavingOptions(output_dir=folder, output_name="mine", **options)  # type: ignore[arg-type]
    facts = {"metadata_at": lambda step, epochs: {}, "dtype": None, "total_epochs": 9, "family": SD1}
    return RunFiles(options=saving, network=network, **facts)


def test_a_folder_that_was_removed_during_the_run_is_made_again(tmp_path):
    files = run_files(tmp_path / "gone", Network())
    assert load_file(files.save_final(3, 1)).keys() == WEIGHTS.keys()


def test_the_result_is_kept_elsewhere_when_its_folder_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = run_files(tmp_path / "full", Network(failing=tmp_path / "full"))
    with pytest.raises(SavingFailed, match="No space left on device.*is saved as .* instead") as raised:
        files.save_final(3, 1)
    (spare,) = tmp_path.glob("trained_*/mine.safetensors")
    assert str(spare) in str(raised.value)
    assert load_file(spare).keys() == WEIGHTS.keys()


def test_who_reads_a_file_is_said_once_and_again_where_it_changes(tmp_path):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = {"lora_down.weight": torch.ones(4, 768), "lora_up.weight": torch.ones(320, 4), "alpha": torch.tensor(1.0)}
    network = Network(weights={f"{layer}.{name}": tensor for name, tensor in lora.items()})
    files = run_files(tmp_path, network)
    everyone = "read rightly by ComfyUI, A1111, Forge, SD.Next, diffusers, LyCORIS, InvokeAI"
    assert files.news_of_readers(files.save_final(3, 1)) == everyone
    assert files.news_of_readers(files.save_final(4, 1)) is None
    network.weights = {f"{layer}.diff": torch.ones(320, 768)}
    news = files.news_of_readers(files.save_final(5, 1))
    assert news == everyone.replace(" diffusers,", "") + "; diffusers would refuse it (the full difference)"


def test_a_file_on_the_way_that_fails_does_not_end_the_run(tmp_path):
    said: list[str] = []
    parts = SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None),
        files=run_files(tmp_path / "full", Network(failing=tmp_path / "full"), every_n_steps=1),
        length=RunLength(batches_per_epoch=9, accumulation=1, steps=9),
        progress=SimpleNamespace(say=said.append),
    )
    _save(parts, 2, None, 0)  # type: ignore[arg-type]
    (sentence,) = said
    assert sentence.startswith("step 2: ")
    assert "No space left on device" in sentence
    assert sentence.endswith("training goes on")


def test_weights_that_are_no_numbers_still_end_it(tmp_path):
    broken = {"lora_unet_x.lora_up.weight": torch.full((2, 2), torch.nan)}
    with pytest.raises(UserError, match="not finite") as raised:
        run_files(tmp_path, Network(weights=broken), every_n_steps=1).save_step(1, 0, 9)
    assert not isinstance(raised.value, SavingFailed)


@pytest.mark.parametrize(("steps_per_epoch", "average"), [(1, 4.0), (2, 3.5), (9, 2.5)])
def test_the_average_loss_is_over_one_epoch(steps_per_epoch, average):
    shown: list[float] = []
    parts = SimpleNamespace(
        accelerator=SimpleNamespace(scaler=None),
        length=RunLength(batches_per_epoch=steps_per_epoch, accumulation=1, steps=9),
        optimizer=SimpleNamespace(param_groups=[]),
        group_names=[],
        tracker=SimpleNamespace(log=lambda step, values: None),
        progress=SimpleNamespace(update=lambda step, loss, rate: shown.append(loss)),
    )
    readings = Readings(parts)  # type: ignore[arg-type]
    for step, loss in enumerate([1.0, 2.0, 3.0, 4.0], start=1):
        readings._note(step, loss, bad=False)
    assert shown[-1] == average
