"""`AdapterNetwork`: the adapters of one file or one training run, on the model they belong to.

Its parameters are named as in the file (`lora_unet_..._to_q.lora_down.weight`) wherever an algorithm trains what it saves;
`file_tensors()` is what the file holds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from library.errors import UserError
from library.families.family import ModelFamily
from library.streams import torch_stream
from networks.building.groups import RateFactors, parameter_groups, text_encoder_rates
from networks.building.summary import GroupSummary, summarise
from networks.building.targets import DENOISER, TEXT_ENCODERS, Part, Target, text_encoder_list
from networks.core.adapter import Adapter, weight_of
from networks.formats import files
from networks.formats.keys import to_kohya

# Which networks are merged into a layer's weight, oldest first. Each holds the weight as it found it, so they can only be
# taken out in the reverse order.
_MERGED: WeakKeyDictionary[nn.Module, list[AdapterNetwork]] = WeakKeyDictionary()


def _weight_and_bias(target: Target) -> list[Tensor]:
    """The layer's weight and, where it has one, its bias."""
    names = ["weight", "bias"] if target.spec.has_bias else ["weight"]
    return [target.layer.get_parameter(name) for name in names]


def _unmerged_weight(target: Target) -> Tensor:
    """The layer's weight before the first of the networks that are merged into it now."""
    merged = _MERGED.get(target.layer)
    return merged[0]._weights_before_merge[target.name][0] if merged else target.layer.get_parameter("weight")


def _is_read_by_hooks(layer: nn.Module) -> bool:
    """Whether an adapter on the layer has a change that depends on its weight."""
    owners = (getattr(hook, "__self__", None) for hook in layer._forward_hooks.values())
    return any(isinstance(owner, Adapter) and owner.reads_base for owner in owners)


@torch.no_grad()
def merge_for_good(networks: Iterable[AdapterNetwork]) -> None:
    """Add the changes of networks to the weights of their model, at their multipliers.

    All of them are changes of the weights as they are now (before merges that can be undone), so their order means
    nothing; their sum is formed in fp32 and rounded once to the weight's dtype.
    """
    layers: dict[nn.Module, list[tuple[Target, Adapter]]] = {}
    for network in networks:
        for target, adapter in network.items():
            if adapter.multiplier != 0:
                layers.setdefault(target.layer, []).append((target, adapter))
    for adapters in layers.values():
        target = adapters[0][0]
        base, tensors = _unmerged_weight(target), _weight_and_bias(target)
        # All of them before the first acts, since `base` may be the weight itself.
        changes = [(adapter.multiplier, (adapter.delta_weight(base), adapter.delta_bias())) for _, adapter in adapters]
        for place, tensor in enumerate(tensors):
            total = tensor.float()  # the weight itself if it is in fp32, which spares three passes over it
            for multiplier, deltas in changes:
                delta = deltas[place]
                if delta is not None:
                    total.add_(delta.to(total.device), alpha=multiplier)
            tensor.copy_(total)


class AdapterNetwork(nn.Module):
    """An ordered map from saved layer name to `Adapter`.

    A new network is not attached: the model is as it was. `attach` adds its effect through forward hooks, `merge` adds it
    to the weights; `detach` and `unmerge` leave the model as it was, bit for bit. Attach before `torch.compile` of the
    model: compiled code does not look for hooks that come later.

    Args:
        adapters: one for each target, in the same order.
        targets: the base layers; kept, but no part of this module.
        family: of the base model.
        multiplier: strength of all adapters.
        rate_factors: learning rates by block and LoRA+.

    Attributes:
        load_report: one line, to be shown, on how the last file and the network met; None where none was loaded.
    """

    load_report: str | None = None

    def __init__(
        self,
        adapters: Iterable[Adapter],
        targets: Iterable[Target],
        *,
        family: ModelFamily,
        multiplier: float = 1.0,
        rate_factors: RateFactors | None = None,
    ) -> None:
        super().__init__()
        self.family = family
        self.rate_factors = rate_factors or RateFactors()
        self.targets: dict[str, Target] = {}
        for adapter, target in zip(adapters, targets, strict=True):
            self.targets[target.name] = target
            self.add_module(target.name, adapter)
        self._hooks: list[RemovableHandle] = []
        self._weights_before_merge: dict[str, list[Tensor]] = {}
        self._rates: dict[Part, float | None] = {}
        self.set_multiplier(multiplier)

    # What there is

    def adapter(self, name: str) -> Adapter:
        """The adapter of one saved layer name."""
        adapter = self._modules[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def items(self) -> Iterator[tuple[Target, Adapter]]:
        """Every target with its adapter, text encoders first."""
        return ((target, self.adapter(name)) for name, target in self.targets.items())

    def keep_parts(self, parts: Iterable[Part]) -> None:
        """Drop the adapters of all other parts; what is left is trained and saved."""
        kept = set(parts)
        for name in [name for name, target in self.targets.items() if target.part not in kept]:
            del self.targets[name]
            del self._modules[name]

    def describe(self) -> list[GroupSummary]:
        """One row for each part and block: modules, ranks, alphas, learning rate, parameters."""
        return summarise(self.items(), self._rates, self.rate_factors)

    # On the model

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._hooks)

    def attach(self) -> None:
        """Add the adapters' effect to their layers' outputs. Any number of networks may be attached to one model.

        Raises:
            RuntimeError: this network is merged; or another one is, into weights that this one's change depends on.
        """
        if self._weights_before_merge:
            raise RuntimeError("the network is merged into the weights; unmerge it before attaching it")
        if any(adapter.reads_base and _MERGED.get(target.layer) for target, adapter in self.items()):
            raise RuntimeError(
                "the network's change depends on weights that another network is merged into; attach or merge both"
            )
        if not self._hooks:
            self._hooks = [target.layer.register_forward_hook(adapter.hook) for target, adapter in self.items()]

    def detach(self) -> None:
        """Take the effect away again, in any order among the attached networks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def set_multipliers(
        self,
        *,
        text_encoder: float,
        denoiser: float | Tensor,
        blocks: Sequence[float | Tensor] | None = None,
    ) -> None:
        """Set the strength of every adapter; cheap enough to be called at every sampling step.

        Args:
            text_encoder: of all layers of all text encoders.
            denoiser: of all its layers, or of those outside all blocks where `blocks` are given. A tensor (rows,) has a
                strength for each row of the batches to come.
            blocks: strengths by U-Net block, likewise.

        Raises:
            ValueError: another number of blocks than the family has.
        """
        if blocks is not None and len(blocks) != self.family.block_count:
            raise ValueError(f"{len(blocks)} block strengths given, {self.family.block_count} wanted")
        for target, adapter in self.items():
            if target.part in TEXT_ENCODERS:
                adapter.set_strength(text_encoder)
            elif blocks is None or target.block is None:
                adapter.set_strength(denoiser)
            else:
                adapter.set_strength(blocks[target.block])

    def set_multiplier(self, multiplier: float) -> None:
        """One strength for all adapters."""
        self.multiplier = multiplier
        self.set_multipliers(text_encoder=multiplier, denoiser=multiplier)

    # In the weights

    def merge(self) -> None:
        """Add the change to the base weights, at the current multipliers, keeping a copy of those weights for `unmerge`.

        Hooks are taken off, or the effect would count twice. The sum is formed in fp32 and rounded once to the weight's
        dtype. Changes that depend on the base weight are those of the weight before the first merge, so that several
        networks add up as they do when they are attached.

        Raises:
            RuntimeError: it is merged already; or the change of another network, which is attached, depends on the weights.
        """
        if self._weights_before_merge:
            raise RuntimeError("the network is merged already")
        self.detach()
        if any(_is_read_by_hooks(target.layer) for target in self.targets.values()):
            raise RuntimeError("an attached network's change depends on these weights; attach or merge both")
        for name, target in self.targets.items():
            self._weights_before_merge[name] = [tensor.detach().clone() for tensor in _weight_and_bias(target)]
            _MERGED.setdefault(target.layer, []).append(self)
        try:
            merge_for_good([self])
        except BaseException:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Put the weights back as `merge` found them.

        Raises:
            RuntimeError: another network was merged into the same weights later, and has to leave first.
        """
        if any(_MERGED[target.layer][-1] is not self for target in self._merged_targets()):
            raise RuntimeError("another network was merged later; unmerge that one first")
        for target in self._merged_targets():
            for tensor, before in zip(_weight_and_bias(target), self._weights_before_merge[target.name], strict=True):
                tensor.data.copy_(before)
            _MERGED[target.layer].pop()
        self._weights_before_merge = {}

    def _merged_targets(self) -> list[Target]:
        return [self.targets[name] for name in self._weights_before_merge]

    # Training: sd-scripts' interface, which the trainer uses for every network module

    def apply_to(
        self,
        text_encoder: nn.Module | Sequence[nn.Module] | None = None,
        unet: nn.Module | None = None,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Attach the chosen parts, and drop the others for good.

        Raises:
            ValueError: models other than those that the network was made for.
            UserError: nothing is left.
        """
        self._check_models(text_encoder, unet)
        parts: list[Part] = []
        if apply_text_encoder:
            parts += TEXT_ENCODERS
        if apply_unet:
            parts.append(DENOISER)
        self.keep_parts(parts)
        if not self.targets:
            raise UserError("the network has no layer in the chosen parts of the model", where="--network_args")
        self.attach()

    def _check_models(self, text_encoder: nn.Module | Sequence[nn.Module] | None, unet: nn.Module | None) -> None:
        given: dict[Part, nn.Module] = dict(zip(TEXT_ENCODERS, text_encoder_list(text_encoder), strict=False))
        if unet is not None:
            given[DENOISER] = unet
        layers = {part: {id(layer) for layer in model.modules()} for part, model in given.items()}
        for target in self.targets.values():
            if target.part in given and id(target.layer) not in layers[target.part]:
                raise ValueError(f"the network was made for another model: {target.name} is no layer of the one given")

    def prepare_optimizer_params(
        self,
        text_encoder_lr: float | Sequence[float | None] | None,
        unet_lr: float | None,
        default_lr: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups for the optimizer, and their names for logs.

        Text encoders have one rate together, or a list of one for each. A rate of None falls back to `default_lr`; 0 freezes
        that part. (sd-scripts returned the groups alone before
        2024, and returns this pair since.)

        Raises:
            UserError: nothing is left to train, or another number of rates than text encoders.
        """
        rates = {**text_encoder_rates(text_encoder_lr, len(self.family.text_encoders)), DENOISER: unet_lr}
        self._rates = {part: rate if rate is not None else default_lr for part, rate in rates.items()}
        self.prepare_grad_etc()
        groups, descriptions = parameter_groups(self.items(), self._rates, self.rate_factors)
        if not groups:
            raise UserError("nothing to train: every learning rate is 0", remedy="give --learning_rate, --unet_lr or more")
        return groups, descriptions

    def prepare_grad_etc(self, text_encoder: Any = None, unet: Any = None) -> None:
        """Let gradients into every adapter, except those whose learning rate is 0."""
        for target, adapter in self.items():
            adapter.requires_grad_(not self._rates or bool(self.rate_factors.rate_of(target, self._rates)))

    def get_trainable_params(self) -> list[nn.Parameter]:
        """The parameters that take gradients."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: adapters run inside their layers, and are recomputed with them."""

    def on_epoch_start(self, text_encoder: Any = None, unet: Any = None) -> None:
        """Switch the adapters' drop-outs on."""
        self.train()

    def begin_step(self, seed: int, step: int) -> None:
        """Let the algorithms that choose something at each optimizer step choose, as a function of seed and step alone."""
        draw = torch.rand((), generator=torch_stream(seed, "adapter step", step)).item()
        largest_ranks: dict[type[Adapter], int] = {}
        for _, adapter in self.items():
            largest_ranks[type(adapter)] = max(adapter.rank, largest_ranks.get(type(adapter), 0))
        for _, adapter in self.items():
            adapter.begin_step(draw, largest_ranks[type(adapter)])

    def on_step_start(self) -> None:
        """Nothing to do: what chooses by step does so in `begin_step`."""

    def is_mergeable(self) -> bool:
        """Whether `merge_to` works: it does for every algorithm that has a `delta_weight`."""
        return True

    def merge_to(
        self,
        text_encoder: nn.Module | Sequence[nn.Module] | None,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the change to the weights for good, at the current multipliers.

        Args:
            weights_sd: tensors to load first; None takes those the network has.
            dtype: without effect, the sum is always formed in fp32; kept for callers of sd-scripts' interface.
            device: without effect likewise: sums are formed where the base weights lie.
        """
        self._check_models(text_encoder, unet)
        if weights_sd is not None:
            self.load_state_dict(weights_sd)
        merge_for_good([self])

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm_value: float, device: torch.device | str | None = None
    ) -> tuple[int, float, float]:
        """Scale every change whose Frobenius norm (alpha / rank included, multiplier not) exceeds the maximum down to it.

        Returns:
            How many were scaled; mean and maximum of the norms afterwards. Reading them is the only wait for the device.
        """
        norms = torch.stack([adapter.delta_norm(weight_of(target.layer)) for target, adapter in self.items()])
        factors = (max_norm_value / norms.clamp(min=max_norm_value)).to(norms.dtype)
        for factor, (_, adapter) in zip(factors, self.items(), strict=True):
            adapter.scale_delta_(factor)
        after = norms * factors
        scaled, mean, largest = torch.stack([(factors < 1).sum().to(norms.dtype), after.mean(), after.max()]).tolist()
        return int(scaled), mean, largest

    # Files

    def file_tensors(self) -> dict[str, Tensor]:
        """What a file of this network holds: saved name -> tensor."""
        return {f"{name}.{tensor}": value for name in self.targets for tensor, value in self.adapter(name).tensors().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As for any module; beside our own names, those that `keys.to_kohya` knows."""
        return super().load_state_dict(to_kohya(state_dict, self.family), strict=strict, assign=assign)

    def load_weights(
        self, file: str | Path, *, allow_unmatched: bool = False, allow_missing: bool = False
    ) -> files.LoadReport:
        """Load a file's tensors into the adapters that are here.

        Args:
            allow_unmatched: accept layers of the file that this network has not; they are left out.
            allow_missing: accept layers of this network that the file has not; they stay as they are.

        Raises:
            UserError: layers that do not match (unless allowed), other ranks, or a file that cannot be read.
        """
        report = files.match_layers(files.read_adapter(file, self.family), self.targets)
        report.check(str(file), self.family, allow_unmatched=allow_unmatched, allow_missing=allow_missing)
        for name, layer_tensors in report.matched.items():
            files.load_layer(self.adapter(name), layer_tensors, name, str(file))
        self.load_report = str(report)
        return report

    def save_weights(self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the adapters: .safetensors with metadata and hashes, .ckpt or .pt as a plain dictionary of tensors.

        Args:
            dtype: of every tensor in the file, alpha included; None keeps the present ones.
            metadata: of the run; `ss_network_variants`, which tells how many layers are of which form, comes in addition.
        """
        if metadata is not None:
            variants = Counter(adapter.variant for _, adapter in self.items())
            metadata = {"ss_network_variants": json.dumps(variants), **metadata}
        files.save_tensors(file, self.file_tensors(), dtype, metadata)
