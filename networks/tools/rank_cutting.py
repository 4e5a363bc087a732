"""Lower ranks out of a low-rank file, which is what DyLoRA is trained for (`networks/dylora.py`).

Rank k of a layer of rank r keeps the first k rows of `down` and columns of `up`, and acts as it did in training, where the
change was scaled by alpha / r * sqrt(r / k). A reader scales by alpha' / k, so that

    alpha' = alpha * sqrt(k / r)

Layers whose own rank is not above k are kept as they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.metadata import PREFIX
from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_writing import write_tensors
from library.errors import UserError, some_names
from library.families.detect import DEFAULT_FAMILY
from library.families.family import ModelFamily
from networks.formats.file_adapters import told_family
from networks.formats.keys import by_layer
from networks.tools.comparing import is_finite
from networks.tools.file_conversion import rounded

FACTORS = ("lora_down.weight", "lora_up.weight")
"""Names of the tensors of (r, in, ...) and (out, r, ...)."""
_KNOWN = {*FACTORS, "alpha", "dora_scale"}

LayerTensors = Mapping[str, Tensor]


def cut_layer(tensors: LayerTensors, rank: int) -> dict[str, Tensor]:
    """One layer at a lower rank.

    Args:
        tensors: `lora_down.weight` (r, in, ...), `lora_up.weight` (out, r, ...), perhaps `alpha` (r where it is missing or
            0) and DoRA's magnitudes, which stay.
        rank: to keep; the layer's own where that is lower.
    """
    down, up = (tensors[name] for name in FACTORS)
    if rank >= len(down):
        return dict(tensors)
    alpha = tensors.get("alpha", torch.zeros((), dtype=down.dtype))
    full_alpha = float(alpha) or float(len(down))
    new_alpha = torch.full(alpha.shape, full_alpha * math.sqrt(rank / len(down)))
    cut = {
        "lora_down.weight": down[:rank].contiguous(),
        "lora_up.weight": up[:, :rank].contiguous(),
        "alpha": rounded(new_alpha, alpha.dtype if alpha.is_floating_point() else torch.float32),
    }
    return {**tensors, **cut}


@dataclass(frozen=True, kw_only=True)
class LowRankFile:
    """A LoRA file, read and found to be fit for cutting.

    Attributes:
        layers: layer name -> tensor name -> tensor.
        family: of the models it is for, as far as it tells.
        metadata: of its header; empty for files that have none.
    """

    path: Path
    layers: Mapping[str, LayerTensors]
    family: ModelFamily
    metadata: Mapping[str, str]

    @property
    def rank(self) -> int:
        """The highest rank of its layers."""
        return max(len(tensors["lora_down.weight"]) for tensors in self.layers.values())

    def ranks(self, unit: int) -> range:
        """unit, 2 unit, ... up to the file's rank.

        Raises:
            UserError: unit does not divide the rank.
        """
        if unit < 1 or self.rank % unit:
            raise UserError(
                f"does not divide the file's rank, {self.rank}",
                where=f"--unit {unit}",
                remedy="give the unit that it was trained with",
            )
        return range(unit, self.rank + 1, unit)

    def tensors_at(self, rank: int) -> dict[str, Tensor]:
        """The file's tensors at a rank, under their names."""
        cut = {name: cut_layer(tensors, rank) for name, tensors in self.layers.items()}
        return {f"{name}.{key}": tensor for name, tensors in cut.items() for key, tensor in tensors.items()}

    def metadata_at(self, rank: int, name: str) -> dict[str, str]:
        """The file's metadata, with what is different about the rank's own file of that name (without suffix).

        What the training was given (`ss_network_args` and the like) stays; hashes are the writer's to add.
        """
        changed = {key: text for key, text in self.metadata.items() if key != f"{PREFIX}hash_sha256"}
        comment = changed.get("ss_training_comment", "None")
        told = f"rank {rank} of {self.rank}, cut from {self.path.name}"
        changed["ss_training_comment"] = told if comment in ("None", "") else f"{told}; {comment}"
        changed["ss_network_dim"] = str(rank)
        changed["ss_network_alpha"] = f"{self._alpha_at(rank):.6g}"
        if "ss_output_name" in changed:
            changed["ss_output_name"] = name
        if f"{PREFIX}title" in changed:
            changed[f"{PREFIX}title"] += f", rank {rank}"
        return changed

    def _alpha_at(self, rank: int) -> float:
        """The alpha that most layers of the highest rank get."""
        highest = [tensors for tensors in self.layers.values() if len(tensors["lora_down.weight"]) == self.rank]
        alphas = (cut_layer(tensors, rank).get("alpha", torch.tensor(float(rank))) for tensors in highest)
        return Counter(float(alpha) or float(rank) for alpha in alphas).most_common(1)[0][0]


def read_low_rank_file(path: Path) -> LowRankFile:
    """Read a LoRA file with kohya's names.

    Raises:
        UserError: no such file, or one that holds something else, or values that are not finite.
    """
    file = open_tensor_file(path)
    tensors = {key: file.read(key) for key in file.keys()}  # noqa: SIM118 (a TensorFile is no mapping)
    layers = by_layer(tensors)
    if not layers:
        raise UserError("is empty", where=str(path))
    for name, layer in layers.items():
        down, up = (layer.get(factor) for factor in FACTORS)
        if down is None or up is None or not _KNOWN.issuperset(layer):
            raise UserError(
                f"is no LoRA file that can be cut: {name} has {some_names(list(layer))}",
                where=str(path),
                remedy="give a file of DyLoRA or LoRA in kohya's layout",
            )
        if down.dim() < 2 or up.dim() < 2 or len(down) != up.shape[1] or not len(down):
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise UserError(f"{name} has factors of {shapes}, which do not belong together", where=str(path))
        if "alpha" in layer and layer["alpha"].numel() != 1:
            raise UserError(f"the alpha of {name} is not one number", where=str(path), remedy="give a sound file")
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(f"{key} holds values that are not finite", where=str(path), remedy="give a sound file")
    return LowRankFile(path=path, layers=layers, family=told_family(file) or DEFAULT_FAMILY, metadata=file.metadata)


def file_of_rank(save_to: Path, rank: int) -> Path:
    """Where a rank goes.

    >>> file_of_rank(Path("a/b.safetensors"), 4).name
    'b-0004.safetensors'
    """
    return save_to.with_name(f"{save_to.stem}-{rank:04d}{save_to.suffix}")


def write_ranks(
    file: LowRankFile, save_to: Path, unit: int, *, progress: Callable[[int, int], None] | None = None
) -> dict[int, Path]:
    """Write one file for each rank: unit, 2 unit, ... up to the source's own; each is opened again and compared.

    Args:
        save_to: the files' common name, to which the rank is added; the suffix decides the format.
        unit: step of the ranks.
        progress: called with the files done and their number.

    Returns:
        Rank -> file, lowest rank first.

    Raises:
        UserError: a source that cannot be cut so, or a place that cannot be written to; before anything is written where
            that can be told.
    """
    places = {rank: file_of_rank(save_to, rank) for rank in file.ranks(unit)}
    for place in (save_to, *places.values()):
        if place.exists() and place.samefile(file.path):
            raise UserError(f"{place.name} is the file to cut", where=f"--save_to {save_to}", remedy="give another name")
    for done, (rank, place) in enumerate(places.items(), start=1):
        _write(place, file.tensors_at(rank), file.metadata_at(rank, place.stem))
        if progress is not None:
            progress(done, len(places))
    return places


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    write_tensors(path, tensors, metadata, add_hashes=True)
    written = open_tensor_file(path)
    same = set(written.keys()) == set(tensors) and all(torch.equal(written.read(key), tensors[key]) for key in tensors)
    if path.suffix == ".safetensors":
        same = same and written.metadata == {**metadata, **sshs_hashes(path)}
    if not same:
        raise UserError("differs from what was meant", where=str(path), remedy="the disk may be at fault; save elsewhere")
