"""How other programs read adapter files: small dated tables, found by running or reading the versions named here.

A newer version may do better. `reading.py` says what a table means, `reader_rules.py` holds the rules about whole files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from networks.formats import reader_rules as rules
from networks.formats.reading import Effect, Reader, Reading, Verdict, read_by
from networks.formats.traits import Header, Trait


def _wrong(why: str = "") -> Verdict:
    return Verdict(Effect.WRONG, why)


def _dropped(why: str = "") -> Verdict:
    return Verdict(Effect.DROPPED, why)


def _refused(why: str = "") -> Verdict:
    return Verdict(Effect.REFUSED, why)


def _all(verdict: Verdict, *traits: Trait) -> dict[Trait, Verdict]:
    return dict.fromkeys(traits, verdict)


_NOT_OF_LAYERS = (
    Trait.ORIGINAL_NAME,
    Trait.FIRST_OF_TWO_NAME,
    Trait.ONLY_ONE_NAME,
    Trait.PEFT_NAME,
    Trait.PEFT_ATTENTION_NAME,
    Trait.OLD_DIFFUSERS_NAME,
    Trait.DOTTED_TEXT_NAME,
    Trait.BARE_NAME,
    Trait.COMFY_NAME,
    Trait.COMFY_TEXT_NAME,
    Trait.BASE_MODEL_NAME,
    Trait.OFT_NAME,
    Trait.OFT_ORIGINAL_NAME,
    Trait.OMI_NAME,
    Trait.UNKNOWN_NAME,
)
"""Names that a reader does not find which makes them from the modules of a diffusers model."""

_HALF = "half a LoRA"
_BASE_NORM = "it divides by the norm of the base weight"
_INPUT_NORM = "it takes the norm along the inputs"
_SQUARED = "strength counts twice"

_COMFY_DROPS = _all(
    _dropped(),
    Trait.TEXT_NORM,
    Trait.PEFT_ATTENTION_NAME,
    Trait.BASE_MODEL_NAME,
    Trait.OFT_NAME,
    Trait.OFT_ORIGINAL_NAME,
    Trait.OMI_NAME,
    Trait.EMBEDDING,
    Trait.UNKNOWN_NAME,
    Trait.ONLY_DOWN,
    Trait.IA3,
    Trait.OFT_MATRICES,
    Trait.NORM_BIAS_ALONE,
    Trait.ALPHA_ALONE,
    Trait.FOREIGN,
)
_COMFY = {
    **_COMFY_DROPS,
    Trait.ONLY_UP: _refused(_HALF),
    Trait.DORA_OUTPUT: _wrong(_BASE_NORM),
    Trait.MAGNITUDE_VECTOR: _wrong("the magnitudes are left out"),
    Trait.FULL_BESIDE: _wrong("only diff is taken"),
    Trait.METADATA_ALPHA: _wrong("it is left out"),
    Trait.SCALE: _wrong("it is left out"),
    Trait.SPARSE_RESIDUE: _wrong("it is left out"),
}

COMFYUI = Reader(
    name="comfyui",
    title="ComfyUI",
    version="0.3.64, 2025-10-12 (loaders of 2026 the same for these models)",
    verdicts=_COMFY
    | {
        Trait.ON_NORM: _dropped(),
        Trait.DORA_FLAT: _dropped(),
        Trait.OFT: _wrong(_SQUARED),
        Trait.BOFT: _wrong(_SQUARED),
        Trait.BOFT_NO_ALPHA: _dropped(),
    },
)

FORGE = Reader(
    name="forge",
    title="Forge",
    version="dfdcbab6, 2025-06-26",
    verdicts=_COMFY
    | _all(_dropped(), Trait.COMFY_TEXT_NAME, Trait.OFT, Trait.BOFT)
    | _all(_refused("generation fails"), Trait.ON_NORM, Trait.DORA_FLAT),
    rules=(rules.too_many_strangers,),
)

A1111 = Reader(
    name="a1111",
    title="A1111",
    version="1.10.1, 2024-07-27",
    verdicts={
        **_all(
            _dropped(),
            Trait.FINAL_NORM,
            Trait.DIFFUSERS_UPSAMPLER,
            Trait.DIFFUSERS_SIZES,
            Trait.ONLY_ONE_NAME,
            Trait.TEXT_PROJECTION,
            Trait.PEFT_NAME,
            Trait.PEFT_ATTENTION_NAME,
            Trait.OLD_DIFFUSERS_NAME,
            Trait.DOTTED_TEXT_NAME,
            Trait.BARE_NAME,
            Trait.COMFY_TEXT_NAME,
            Trait.LYCORIS_NAME,
            Trait.BASE_MODEL_NAME,
            Trait.OFT_NAME,
            Trait.OMI_NAME,
            Trait.UNKNOWN_NAME,
            Trait.GLORA,
            Trait.IA3_OUTPUT_KERNEL,
            Trait.DORA_FLAT,
        ),
        **_all(
            _refused(),
            Trait.COMFY_NAME,
            Trait.GLORA_OLD_NO_ALPHA,
            Trait.BIAS_ALONE,
            Trait.NORM_WEIGHT_ALONE,
            Trait.NORM_BIAS_ALONE,
            Trait.ALPHA_ALONE,
            Trait.FOREIGN,
            Trait.ON_NORM,
        ),
        **_all(_refused(_HALF), Trait.ONLY_UP, Trait.ONLY_DOWN),
        Trait.AB_ALPHA: _wrong("alpha is left out"),
        Trait.DORA_OUTPUT: _wrong(_INPUT_NORM),
        Trait.MAGNITUDE_VECTOR: _wrong("the magnitudes are left out"),
        Trait.BIAS_BESIDE: _wrong("the bias is left out"),
        Trait.SPARSE_RESIDUE: _wrong("it is left out"),
    },
    rules=(
        rules.whole_attention,
        rules.only_in_clip,
    ),
)


DIFFUSERS = Reader(
    name="diffusers",
    title="diffusers",
    version="0.42.1 (and 58eb52c0, 2026-08-23)",
    verdicts={
        **_all(
            _refused(),
            Trait.LYCORIS_NAME,
            Trait.EMBEDDING,
            Trait.AB_TENSORS,
            Trait.TUCKER,
            Trait.LOHA,
            Trait.LOKR,
            Trait.LOKR_TUCKER,
            Trait.GLORA,
            Trait.GLORA_OLD,
            Trait.IA3,
            Trait.OFT,
            Trait.OFT_MATRICES,
            Trait.BOFT,
            Trait.FULL,
            Trait.NORM,
            Trait.BIAS_ALONE,
            Trait.NORM_WEIGHT_ALONE,
            Trait.NORM_BIAS_ALONE,
            Trait.ALPHA_ALONE,
            Trait.FOREIGN,
            Trait.BIAS_BESIDE,
            Trait.FULL_BESIDE,
            Trait.SCALE,
            Trait.SPARSE_RESIDUE,
            Trait.EXTRA,
            Trait.ON_NORM,
            Trait.FLAT_KERNEL,
            Trait.OTHER_PROJECTION,
        ),
        **_all(_refused(_HALF), Trait.ONLY_UP, Trait.ONLY_DOWN),
        **_all(
            _dropped(),
            Trait.ORIGINAL_NAME,
            Trait.DIFFUSERS_SIZES,
            Trait.BARE_NAME,
            Trait.COMFY_NAME,
            Trait.COMFY_TEXT_NAME,
            Trait.BASE_MODEL_NAME,
            Trait.OFT_NAME,
            Trait.OFT_ORIGINAL_NAME,
            Trait.OMI_NAME,
            Trait.UNKNOWN_NAME,
        ),
        **_all(_wrong("the magnitudes are left out"), Trait.DORA_INPUT, Trait.DORA_OUTPUT, Trait.DORA_FLAT),
    },
    rules=(
        rules.kohya_or_peft,
        rules.one_wording,
        rules.text_encoder_by_its_outputs,
        rules.one_alpha_for_each_part,
        rules.text_magnitudes_by_name,
        rules.nothing_left,
    ),
    wants_one_alpha=True,
)

LYCORIS = Reader(
    name="lycoris",
    title="LyCORIS",
    version="3.3.0 (2025-10-04) to 4.1.3",
    verdicts={
        **_all(
            _dropped(),
            *_NOT_OF_LAYERS,
        ),
        **_all(
            _refused(),
            Trait.NO_ALPHA,
            Trait.AB_TENSORS,
            Trait.DORA_INPUT,
            Trait.DORA_FLAT,
            Trait.GLORA_OLD,
            Trait.IA3,
            Trait.OFT_MATRICES,
            Trait.LOKR_TUCKER,
            Trait.BIAS_ALONE,
            Trait.NORM_BIAS_ALONE,
            Trait.ALPHA_ALONE,
            Trait.FOREIGN,
            Trait.ON_NORM,
        ),
        **_all(_refused(_HALF), Trait.ONLY_UP, Trait.ONLY_DOWN),
        Trait.MAGNITUDE_VECTOR: _wrong("the magnitudes are left out"),
        Trait.BIAS_BESIDE: _wrong("the bias is left out"),
        Trait.SCALE: _wrong("it is left out"),
        Trait.SPARSE_RESIDUE: _wrong("it is left out"),
    },
)

INVOKEAI = Reader(
    name="invokeai",
    title="InvokeAI",
    version="8e71a8a5, 2026-08-19",
    verdicts={
        **_all(
            _dropped(),
            *_NOT_OF_LAYERS,
            Trait.LYCORIS_NAME,
        ),
        **_all(
            _refused(),
            Trait.AB_TENSORS,
            Trait.DORA_FLAT,
            Trait.DORA_NOT_LORA,
            Trait.GLORA,
            Trait.GLORA_OLD,
            Trait.OFT,
            Trait.OFT_MATRICES,
            Trait.BOFT,
            Trait.BIAS_ALONE,
            Trait.NORM_WEIGHT_ALONE,
            Trait.NORM_BIAS_ALONE,
            Trait.SPARSE_RESIDUE,
            Trait.ALPHA_ALONE,
            Trait.FOREIGN,
            Trait.ON_NORM,
            Trait.ONLY_ONE_NAME,
        ),
        **_all(_refused(_HALF), Trait.ONLY_UP, Trait.ONLY_DOWN),
        Trait.DORA_OUTPUT: _wrong(_INPUT_NORM),
        Trait.MAGNITUDE_VECTOR: _wrong("the magnitudes are left out"),
        Trait.BIAS_BESIDE: _wrong("the bias is left out"),
        Trait.SCALE: _wrong("it is left out"),
    },
    rules=(rules.base_by_one_width, rules.all_one_wording),
    wants_width=True,
)

SDNEXT = Reader(
    name="sdnext",
    title="SD.Next",
    version="058a7f0c, 2026-07-23",
    verdicts={
        **_all(
            _dropped(),
            Trait.FIRST_OF_TWO_NAME,
            Trait.ONLY_ONE_NAME,
            Trait.PEFT_NAME,
            Trait.PEFT_ATTENTION_NAME,
            Trait.OLD_DIFFUSERS_NAME,
            Trait.DOTTED_TEXT_NAME,
            Trait.BARE_NAME,
            Trait.COMFY_NAME,
            Trait.COMFY_TEXT_NAME,
            Trait.LYCORIS_NAME,
            Trait.BASE_MODEL_NAME,
            Trait.OFT_NAME,
            Trait.UNKNOWN_NAME,
            Trait.AB_TENSORS,
            Trait.ONLY_UP,
            Trait.ONLY_DOWN,
            Trait.GLORA,
            Trait.GLORA_OLD_NO_ALPHA,
            Trait.GLORA_OLD_KERNEL,
            Trait.OFT_NO_LIMIT,
            Trait.BOFT,
            Trait.BIAS_ALONE,
            Trait.NORM_WEIGHT_ALONE,
            Trait.NORM_BIAS_ALONE,
            Trait.ALPHA_ALONE,
            Trait.FOREIGN,
            Trait.ON_NORM,
        ),
        Trait.ROW_SCALE: _wrong("it is left out"),
        Trait.MAGNITUDE_VECTOR: _wrong("the magnitudes are left out"),
    },
)

READERS: Mapping[str, Reader] = {
    reader.name: reader for reader in (COMFYUI, A1111, FORGE, SDNEXT, DIFFUSERS, LYCORIS, INVOKEAI)
}


def readings(header: Header) -> list[Reading]:
    """What every program here makes of a file."""
    return [read_by(reader, header) for reader in READERS.values()]


def readers_sentence(results: Sequence[Reading]) -> str:
    """One line: who applies all of it rightly, and what is wrong with the others.

    >>> readers_sentence([read_by(reader, header) for reader in (COMFYUI, A1111, DIFFUSERS)])  # doctest: +SKIP
    'read rightly by ComfyUI and A1111; diffusers would refuse it (LoHa)'
    """
    good = [result.reader.title for result in results if result.is_right]
    faults = [str(result) for result in results if not result.is_right]
    readers = ", ".join(good) or "none of the programs known here"
    return "; ".join([f"read rightly by {readers}", *faults])
