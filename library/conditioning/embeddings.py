"""Textual inversion (Gal et al., arXiv:2208.01618): files with vectors, which become words of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.tensor_files import open_tensor_file
from library.checkpoints.tensor_places import TensorFile
from library.conditioning.clip_text import token_ids
from library.conditioning.learned_words import folded, learned_words, teach
from library.conditioning.text_encoders import TextEncoders
from library.errors import UserError, counted, raise_all, some_names
from library.families.detect import FAMILIES

BUNDLE = "bundle_emb."
_FIRST = ("emb_params", "clip_l", "string_to_param.*")  # what programs call the vectors of the first text encoder
_SECOND = "clip_g"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A word and its vectors.

    Attributes:
        name: what prompts call it.
        vectors: (n, D) for each text encoder, as saved; it takes n tokens of a prompt.
        where: the file, for sentences.
    """

    name: str
    vectors: tuple[Tensor, ...]
    where: str

    def check_widths(self, widths: Sequence[int]) -> None:
        """Refuse vectors for other text encoders.

        Args:
            widths: D of each text encoder.

        Raises:
            UserError
        """
        own = [vectors.shape[1] for vectors in self.vectors]
        if own == list(widths):
            return
        found = {
            family.title for family in FAMILIES if own == [encoder.config["hidden_size"] for encoder in family.text_encoders]
        }
        kind = f"is for {found.pop()}" if found else "does not fit the base model"
        have, takes = (" and ".join(map(str, each)) for each in (own, widths))
        encoders = "text encoder takes" if len(widths) == 1 else "text encoders take"
        raise UserError(f"{kind}: its vectors are {have} wide, and the {encoders} {takes}", where=self.where)


def read_embedding(path: Path | str) -> Embedding:
    """The embedding of a file, named as the file is: AUTOMATIC1111's .pt, .safetensors, or {token: vectors} of diffusers.

    Raises:
        UserError: missing, damaged, or no embedding.
    """
    path = Path(path)
    file = open_tensor_file(path)
    return Embedding(name=path.stem, vectors=_vectors(file, {key: key for key in file.places}, str(path)), where=str(path))


def read_bundled_embeddings(path: Path | str) -> tuple[Embedding, ...]:
    """The embeddings in a LoRA file (`bundle_emb.NAME.KEY`), in the order of their names; none where there are none.

    Raises:
        UserError: as `read_embedding` does.
    """
    file = open_tensor_file(path)
    bundles: dict[str, dict[str, str]] = {}
    for key in file.places:
        if key.startswith(BUNDLE):
            name, _, rest = key.removeprefix(BUNDLE).partition(".")
            bundles.setdefault(name, {})[rest] = key
    found = []
    for name, keys in sorted(bundles.items()):
        where = f"{path}: the embedding {name}"
        found.append(Embedding(name=name, vectors=_vectors(file, keys, where), where=where))
    return tuple(found)


def _vectors(file: TensorFile, keys: Mapping[str, str], where: str) -> tuple[Tensor, ...]:
    """(n, D) for each text encoder, from the tensors of one embedding, by the names they have in it."""
    known = [name for name in keys if name in _FIRST]
    second = [keys[_SECOND]] if _SECOND in keys else []
    if len(known) != 1 and len(keys) != 1 + len(second):
        what = (
            f"is no textual inversion embedding: it holds {counted(len(keys), 'tensor')} ({some_names(list(keys), _SHOWN)})"
        )
        raise UserError(what, where=where)
    first = keys[known[0]] if known else next((key for name, key in keys.items() if name != _SECOND), None)
    vectors = tuple(_read(file, key, where) for key in (first, *second) if key is not None)
    if len({len(each) for each in vectors}) > 1:
        counts = " and ".join(str(len(each)) for each in vectors)
        raise UserError(f"has {counts} vectors for two text encoders, which must be as many", where=where)
    return vectors


def _read(file: TensorFile, key: str, where: str) -> Tensor:
    shape = file.shape(key)
    if not 1 <= len(shape) <= 2 or 0 in shape or not file.dtype(key).is_floating_point:
        raise UserError(f"is no textual inversion embedding: {key} has the shape {list(shape)}", where=where)
    vectors = file.read(key).reshape(-1, shape[-1])
    if not torch.isfinite(vectors).all():
        raise UserError("has vectors that are no numbers (NaN or infinite)", where=where, remedy="fetch it again")
    return vectors


def add_embeddings(texts: TextEncoders, embeddings: Sequence[Embedding]) -> list[str]:
    """Make embeddings words of prompts: the tokenizers learn their names, and the text encoders their vectors.

    A name with the vectors that it has already is left as it is, so that a file may be given twice.

    Returns:
        What a user should know, one sentence each.

    Raises:
        UserError: vectors of other widths, and names with two meanings; all of them at once, and nothing is added then.
    """
    tables = [_Table(tokenizer, module) for tokenizer, module in zip(texts.tokenizers, texts.modules, strict=True)]
    notes: list[str] = []
    problems: list[UserError] = []
    for embedding in embeddings:
        word = folded(embedding.name)
        try:
            embedding.check_widths([table.width for table in tables])
            new = [table.is_new(word, embedding, own) for table, own in zip(tables, embedding.vectors, strict=True)]
        except UserError as error:
            problems.append(error)
            continue
        if not any(new):
            continue
        for table, own in zip(tables, embedding.vectors, strict=True):
            table.add(word, own)
        if len(token_ids(texts.tokenizers[0], word)) == 1:
            what = f"the embedding {embedding.name} has the name of a word that the model knows"
            notes.append(f"{what}: {embedding.name!r} in a prompt is the embedding now (rename the file to keep both)")
    raise_all(problems)
    for table in tables:
        table.apply()
    return notes


class _Table:
    """What is to be added to one text encoder."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self._tokenizer, self._encoder = tokenizer, encoder
        self._weights = encoder.get_input_embeddings().weight.data
        self._known = {word: self._weights[list(rows)] for word, rows in learned_words(tokenizer).rows.items()}
        self._added: list[Tensor] = []
        self._rows: dict[str, tuple[int, ...]] = {}

    @property
    def width(self) -> int:
        return self._weights.shape[1]

    def is_new(self, word: str, embedding: Embedding, vectors: Tensor) -> bool:
        """Whether the word is; a `UserError` where it stands for other vectors."""
        known = self._known.get(word)
        if known is not None and not torch.equal(known, vectors.to(known)):
            what = f"another embedding is called {embedding.name} too (capitals do not count)"
            raise UserError(what, where=embedding.where, remedy="rename one of the files")
        return known is None

    def add(self, word: str, vectors: Tensor) -> None:
        own = vectors.to(self._weights)
        first = len(self._weights) + sum(map(len, self._added))
        self._known[word], self._rows[word] = own, tuple(range(first, first + len(own)))
        self._added.append(own)

    def apply(self) -> None:
        old = self._encoder.get_input_embeddings()
        new = nn.Embedding.from_pretrained(torch.cat([self._weights, *self._added]), freeze=not old.weight.requires_grad)
        self._encoder.set_input_embeddings(new.train(old.training))
        teach(self._tokenizer, self._rows)
