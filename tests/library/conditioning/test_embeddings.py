"""Embeddings of every format become words of prompts: their vectors are what the text encoder reads there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from library.checkpoints.tensor_writing import write_tensors
from library.checkpoints.tokenizers import shipped_tokenizer
from library.conditioning import clip_text
from library.conditioning.embeddings import Embedding, add_embeddings, read_bundled_embeddings, read_embedding
from library.conditioning.learned_words import LearnedWords
from library.conditioning.text_encoders import TextEncoders
from library.errors import UserError
from library.families.sd1 import SD1
from library.families.sd2 import SD2
from library.families.sdxl import SDXL
from tests.support.tiny_models import TEXT_WIDTHS, build_tiny_parts

VECTORS, WIDER = (torch.randn(3, width, generator=torch.Generator().manual_seed(0)) for width in TEXT_WIDTHS)


def saved(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def written(path: Path, tensors: dict[str, Tensor]) -> Path:
    write_tensors(path, tensors)
    return path


WEBUI = {"string_to_token": {"*": 265}, "name": "other", "step": 500, "sd_checkpoint": None}
FORMATS = {
    "web UI": lambda path: saved(path / "zorb.pt", WEBUI | {"string_to_param": {"*": nn.Parameter(VECTORS)}}),
    "first code": lambda path: saved(
        path / "zorb.pt", {"string_to_param": nn.ParameterDict({"*": nn.Parameter(VECTORS)}), "string_to_token": {}}
    ),
    "diffusers .bin": lambda path: saved(path / "zorb.bin", {"<zorb>": VECTORS}),
    "sd-scripts": lambda path: written(path / "zorb.safetensors", {"emb_params": VECTORS}),
    "diffusers .safetensors": lambda path: written(path / "zorb.safetensors", {"<zorb>": VECTORS}),
    "first encoder": lambda path: written(path / "zorb.safetensors", {"clip_l": VECTORS}),
    "both encoders": lambda path: written(path / "zorb.safetensors", {"clip_g": WIDER, "clip_l": VECTORS}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_vectors_and_the_files_name(name, tmp_path):
    embedding = read_embedding(FORMATS[name](tmp_path))
    assert embedding.name == "zorb"
    assert torch.equal(embedding.vectors[0], VECTORS)
    assert len(embedding.vectors) == (2 if name == "both encoders" else 1)
    assert torch.equal(embedding.vectors[-1], WIDER if name == "both encoders" else VECTORS)


def test_a_single_vector_may_be_saved_without_a_count(tmp_path):
    assert torch.equal(read_embedding(saved(tmp_path / "one.bin", {"<one>": VECTORS[0]})).vectors[0], VECTORS[:1])


def test_embeddings_in_a_lora_file_are_found_by_name(tmp_path):
    tensors = {
        "lora_unet_x.alpha": torch.ones(()),
        "bundle_emb.zorb.string_to_param.*": VECTORS,
        "bundle_emb.blip.emb_params": VECTORS[:1],
        "bundle_emb.clop.clip_l": VECTORS[1:],
    }
    found = read_bundled_embeddings(written(tmp_path / "lora.safetensors", tensors))
    assert [(one.name, len(one.vectors[0])) for one in found] == [("blip", 1), ("clop", 2), ("zorb", 3)]
    assert torch.equal(found[2].vectors[0], VECTORS)
    assert read_bundled_embeddings(written(tmp_path / "plain.safetensors", {"lora_unet_x.alpha": torch.ones(())})) == ()
    tensors["bundle_emb.zorb.clip_g"] = WIDER
    found = read_bundled_embeddings(written(tmp_path / "lora.safetensors", tensors))
    assert torch.equal(found[2].vectors[1], WIDER)
    tensors["bundle_emb.zorb.clip_g"] = WIDER[:2]
    with pytest.raises(UserError, match="lora.safetensors: the embedding zorb: has 3 and 2 vectors for two text encoders"):
        read_bundled_embeddings(written(tmp_path / "lora.safetensors", tensors))


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"a": VECTORS, "b": VECTORS}, "is no textual inversion embedding: it holds 2 tensors (a, b)"),
        ({"emb_params": torch.ones(2, 2, 2)}, "is no textual inversion embedding: emb_params has the shape [2, 2, 2]"),
        ({"emb_params": torch.ones(1, 4, dtype=torch.int32)}, "is no textual inversion embedding: emb_params has"),
        ({"emb_params": torch.full((1, 4), float("nan"))}, "has vectors that are no numbers"),
    ],
)
def test_files_that_are_none_are_refused(tensors, sentence, tmp_path):
    with pytest.raises(UserError) as told:
        read_embedding(written(tmp_path / "bad.safetensors", tensors))
    assert sentence in str(told.value)


@pytest.fixture(params=[SD1, SD2, SDXL], ids=lambda family: family.name)
def texts(request):
    encoders, parts = request.param.text_encoders, build_tiny_parts(request.param)
    tokenizers = [shipped_tokenizer(encoder) for encoder in encoders]
    return TextEncoders(specs=encoders, tokenizers=tokenizers, modules=[parts[encoder.part] for encoder in encoders])


def embedding(texts: TextEncoders, name: str, change: float = 0, count: int = 3) -> Embedding:
    vectors = tuple((own + change)[:count] for own, _ in zip((VECTORS, WIDER), texts.modules, strict=False))
    return Embedding(name=name, vectors=vectors, where=f"{name}.pt")


def test_a_name_in_a_prompt_becomes_its_vectors_and_all_else_stays(texts):
    pairs = list(zip(texts.tokenizers, texts.modules, (VECTORS, WIDER), strict=False))
    before = [clip_text.token_ids(tokenizer, "a photo of a red cat, wow! it's") for tokenizer in texts.tokenizers]
    plain = texts.encode(texts.tokenize(["a red cat!"])).context
    tables = [encoder.get_input_embeddings().weight.clone() for encoder in texts.modules]
    assert add_embeddings(texts, [embedding(texts, "zorb"), embedding(texts, "Blip-2", change=1, count=1)]) == []
    after = [clip_text.token_ids(tokenizer, "a photo of a red cat, wow! it's") for tokenizer in texts.tokenizers]
    assert after == before
    assert torch.equal(texts.encode(texts.tokenize(["a red cat!"])).context, plain)

    seen = []
    for encoder in texts.modules:
        encoder.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    texts.encode(texts.tokenize(["a (ZORB:1.2), blip-2 cat"], weighted=True))
    for (tokenizer, _, vectors), table, output in zip(pairs, tables, seen, strict=True):
        a, comma, cat = (table[clip_text.token_ids(tokenizer, word)] for word in ("a", ",", "cat"))
        assert torch.equal(output[0, 1:8], torch.cat([a, vectors, comma, vectors[:1] + 1, cat]))


def test_more_embeddings_may_follow_and_the_same_one_is_not_added_twice(texts):
    sizes = [encoder.get_input_embeddings().num_embeddings for encoder in texts.modules]
    add_embeddings(texts, [embedding(texts, "zorb")])
    add_embeddings(texts, [embedding(texts, "blip", count=2), embedding(texts, "ZORB")])
    for tokenizer, encoder, size in zip(texts.tokenizers, texts.modules, sizes, strict=True):
        assert clip_text.token_ids(tokenizer, "blip zorb") == [size + 3, size + 4, size, size + 1, size + 2]
        assert encoder.get_input_embeddings().num_embeddings == size + 5


def test_a_word_of_the_model_may_be_taken_and_is_told(texts):
    size = texts.modules[0].get_input_embeddings().num_embeddings
    others = clip_text.token_ids(texts.tokenizers[0], "cats catamaran tomcat")
    (note,) = add_embeddings(texts, [embedding(texts, "cat", count=1)])
    assert "the embedding cat has the name of a word that the model knows" in note
    assert clip_text.token_ids(texts.tokenizers[0], "Cat") == [size]
    assert clip_text.token_ids(texts.tokenizers[0], "cats catamaran tomcat") == others


def test_wrong_widths_and_colliding_names_are_told_at_once_and_nothing_is_added(texts):
    size = texts.modules[0].get_input_embeddings().num_embeddings
    wrong = [
        embedding(texts, "zorb"),
        embedding(texts, "Zorb", change=1),
        *(
            Embedding(name=name, vectors=tuple(torch.ones(1, width) for width in widths), where=f"{name}.pt")
            for name, widths in {"wide": (768, 1280), "two": (1024,), "odd": (5,)}.items()
        ),
    ]
    with pytest.raises(UserError) as told:
        add_embeddings(texts, wrong)
    widths = TEXT_WIDTHS[: len(texts.modules)]
    takes = f"text encoder takes {widths[0]}" if len(widths) == 1 else "text encoders take {} and {}".format(*widths)
    assert [str(problem) for problem in told.value.problems] == [
        "Zorb.pt: another embedding is called Zorb too (capitals do not count); rename one of the files",
        f"wide.pt: is for Stable Diffusion XL: its vectors are 768 and 1280 wide, and the {takes}",
        f"two.pt: is for Stable Diffusion 2.x: its vectors are 1024 wide, and the {takes}",
        f"odd.pt: does not fit the base model: its vectors are 5 wide, and the {takes}",
    ]
    for tokenizer, encoder in zip(texts.tokenizers, texts.modules, strict=True):
        assert encoder.get_input_embeddings().num_embeddings == size
        assert max(clip_text.token_ids(tokenizer, "zorb")) < size


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", [""]),
        ("a cat", ["a cat"]),
        ("zorb", [(1, 2)]),
        ("a zorb, Zorb-x", ["a ", (1, 2), ", ", (1, 2), "-x"]),
        ("zorbs zorb2 zorb_ xzorb", ["zorbs zorb2 zorb_ xzorb"]),
        ("zorb two and zorb  TWO", [(3,), " and ", (3,)]),
        ("a<q>b", ["a", (4,), "b"]),
    ],
)
def test_whole_words_are_found_the_longest_first(text, pieces):
    words = LearnedWords({"Zorb": (1, 2), "zorb two": (3,), "<q>": (4,)})
    assert list(words.split(text)) == pieces


def test_weights_keep_their_type_and_what_trains_goes_on_training(texts):
    for encoder in texts.modules:
        encoder.to(torch.bfloat16).requires_grad_(False)
    add_embeddings(texts, [embedding(texts, "zorb")])
    for encoder in texts.modules:
        weight = encoder.get_input_embeddings().weight
        assert weight.dtype == torch.bfloat16
        assert not weight.requires_grad
        assert not encoder.get_input_embeddings().training
