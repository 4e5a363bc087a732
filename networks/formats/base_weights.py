"""The weights of a base model by our layer names, read one at a time: for changes that depend on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.checkpoints.parts import UNET
from library.errors import UserError
from networks.core.adapter import LayerSpec
from networks.formats.layer_names import DENOISER, TEXT_LEVEL, layer_names

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.base_model import BaseModelFiles
    from library.checkpoints.parts import TensorSource
    from library.families.family import ModelFamily


class BaseWeights:
    """Of one model.

    Args:
        model: whose weights are read when they are asked for.
    """

    def __init__(self, model: BaseModelFiles) -> None:
        self.model = model

    @classmethod
    def open(cls, path: str | None, *, family: str | None = None) -> BaseWeights | None:
        """Of a checkpoint, diffusers folder or Hub id; None for None.

        Args:
            family: name of the only one that will do; None for any.
        """
        from library.checkpoints.base_model import open_base_model

        return None if path is None else cls(open_base_model(path, family=family))

    def check_family(self, family: ModelFamily, where: str) -> None:
        """Refuse a model that is not of the adapters' family.

        Args:
            where: how sentences name the model.

        Raises:
            UserError
        """
        if self.model.family != family:
            what = f"is {self.model.family.title}, and the adapter is for {family.title}"
            raise UserError(what, where=where, remedy="give the model it was trained on")

    def spec(self, name: str) -> LayerSpec:
        """The shape of a layer.

        Raises:
            UserError: the model has no such layer.
        """
        source = self._source(name, "weight")
        if source is None:
            raise UserError(f"has no layer {name}", where=str(self.model.path), remedy="give the model it was trained on")
        return LayerSpec(weight_shape=source.shape, has_bias=self._source(name, "bias") is not None)

    def weight(self, name: str) -> Tensor:
        """The weight of a layer, as stored; `spec` finds out whether there is one."""
        source = self._source(name, "weight")
        assert source is not None
        return source.read()

    def place(self, name: str, tensor: str) -> tuple[str, str] | None:
        """The part and the name there of a layer's "weight" or "bias"; None where the model has none."""
        found = layer_names(self.model.family).find(name)
        if found is None:
            return None
        kind = UNET if found.part == DENOISER else found.part
        path = f"{found.path}.{tensor}"
        names = [each for each in (path, path.removeprefix(TEXT_LEVEL)) if each in self.model.parts[kind].sources]
        return (kind, names[0]) if names else None

    def _source(self, name: str, tensor: str) -> TensorSource | None:
        place = self.place(name, tensor)
        return None if place is None else self.model.parts[place[0]].sources[place[1]]
