"""Network modules of other packages, called as sd-scripts calls them.

They were written for sd-scripts: a Stable Diffusion text encoder whose layers lie in `text_model`, and the interface that
docs/architecture.md lists under "networks". What the installed libraries do otherwise is put right here, on what the
modules are given; nothing of theirs is changed.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from library.errors import UserError
from networks.building.targets import text_encoder_list

_REFUSALS = (AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a module may raise about settings or a model that it does not take; none of them has a sentence for the user."""


class ThirdPartyModule:
    """A network module of another package behind the interface of our own.

    Args:
        module: imported, with a function `create_network`.
        name: as the user gave it.
    """

    def __init__(self, module: ModuleType, name: str) -> None:
        self.module = module
        self.__name__ = module.__name__
        self._where = f"--network_module {name}"

    def check_merging(self, file: str) -> None:
        """Refuse to merge where that is known to give something else than attaching.

        Raises:
            UserError: LyCORIS, whose networks of 4.1 merge with strength 1 whatever is asked, and LoHa and LoKr with their
                scale twice.
        """
        if self.module.__name__ == _LYCORIS:
            raise UserError(
                "would be merged wrongly by LyCORIS, which leaves out the strength",
                where=file,
                remedy="use --network_module networks.lora, which reads its files, or leave out --network_merge",
            )

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: Any,
        text_encoder: Any,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **network_args: Any,
    ) -> Any:
        """A new network of the module's own class; `neuron_dropout` is handed over as `dropout` too, as sd-scripts does.

        Raises:
            UserError: the module refuses.
        """
        settings = {"dropout": neuron_dropout, **network_args}
        with self._refusals_as_sentences(), _without_double_names(self.module, settings, unet) as settings:
            return self.module.create_network(
                multiplier,
                network_dim,
                network_alpha,
                vae,
                _as_they_know_it(text_encoder),
                unet,
                neuron_dropout=neuron_dropout,
                **settings,
            )

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | None,
        vae: Any,
        text_encoder: Any,
        unet: nn.Module,
        weights_sd: Mapping[str, Any] | None = None,
        for_inference: bool = False,
        **network_args: Any,
    ) -> tuple[Any, Mapping[str, Any]]:
        """A network with the layers and ranks of a file, and the file's tensors.

        Raises:
            UserError: the module refuses, or has no such function.
        """
        create = getattr(self.module, "create_network_from_weights", None)
        if create is None:
            raise UserError("cannot read adapter files", where=self._where)
        if self.module.__name__ == _LYCORIS:
            # The layers of its presets are made here too, only to be thrown away: none of them is needed.
            self.module.LycorisNetworkKohya.apply_preset({"unet_target_name": []})
        with self._refusals_as_sentences():
            network, weights = create(
                multiplier,
                file,
                vae,
                _as_they_know_it(text_encoder),
                unet,
                weights_sd=weights_sd,
                for_inference=for_inference,
                **network_args,
            )
        if network is None:
            raise UserError("is no file of this module", where=str(file), remedy="give the module it was trained with")
        return network, weights

    @contextlib.contextmanager
    def _refusals_as_sentences(self) -> Iterator[None]:
        try:
            yield
        except _REFUSALS as error:
            what = f"makes no network for this base model ({type(error).__name__}: {error})"
            raise UserError(what, where=self._where) from error


def require_all_loaded(loaded: Any, where: str) -> None:
    """Refuse a file with tensors that a network has no place for, which sd-scripts' interface passes over.

    Args:
        loaded: what the network's `load_weights` or `load_state_dict` gave back: torch's lists of keys, or LyCORIS'.
        where: names the file in the sentence.

    Raises:
        UserError: there are such tensors.
    """
    lists = loaded if isinstance(loaded, Mapping) else {"unexpected keys": getattr(loaded, "unexpected_keys", ())}
    left_over = lists.get("unexpected keys", ())
    if left_over:
        raise UserError(
            f"{len(left_over)} of its tensors have no place in the network ({left_over[0]}, ...)",
            where=where,
            remedy="give the module and the settings it was trained with",
        )


class _WithTextModel(nn.Module):
    """A text encoder with the level `text_model` around its layers, which transformers 5.6 removed.

    Modules name layers after their paths, and all programs know those of text encoders with that level.
    """

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = text_encoder

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.text_model, name)

    def forward(self, *values: Any, **settings: Any) -> Any:
        return self.text_model(*values, **settings)


def _as_they_know_it(text_encoder: nn.Module | Sequence[nn.Module] | None) -> Any:
    """What sd-scripts hands over: the only text encoder itself, or a list of several."""
    encoders = [
        encoder if "text_model" in dict(encoder.named_children()) else _WithTextModel(encoder)
        for encoder in text_encoder_list(text_encoder)
    ]
    return encoders if len(encoders) > 1 else next(iter(encoders), None)


_LYCORIS = "lycoris.kohya"


@contextlib.contextmanager
def _without_double_names(module: ModuleType, settings: Mapping[str, Any], unet: nn.Module) -> Iterator[dict[str, Any]]:
    """The settings, for LyCORIS with a preset that names no layer twice.

    LyCORIS 4.1 has the layers of the time embedding in its presets for whole U-Nets by their names, and also their class,
    for the sake of other models. On diffusers' U-Net it then makes these layers twice, and refuses its own network. Such a
    preset is given to it again without the names of layers that a class of it takes, as a preset file, its documented
    way of choosing layers.
    """
    presets = getattr(module, "PRESET", {}) if module.__name__ == _LYCORIS else {}
    preset = presets.get(settings.get("preset", "full"), {})
    names, classes = preset.get("unet_target_name", []), preset.get("unet_target_module", [])
    inside = {
        f"{path}.{child}"
        for path, layer in unet.named_modules()
        if type(layer).__name__ in classes
        for child, _ in layer.named_modules()
    }
    if inside.isdisjoint(names):
        yield dict(settings)
        return
    import toml

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "preset.toml"
        single = {**preset, "unet_target_name": [name for name in names if name not in inside]}
        file.write_text(toml.dumps(single), encoding="utf-8")
        yield {**settings, "preset": str(file)}
