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
from library.errors import UserError, counted, raise_all, some_names
from library.families.detect import FAMILIES

BUNDLE = "bundle_emb."
_KEYS = ("emb_params", "clip_l", "string_to_param.*")  # what programs call the vectors
_SECOND_ENCODER = "clip_g"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A word and its vectors.

    Attributes:
        name: what prompts call it.
        vectors: (n, D), as saved; it takes n tokens of a prompt.
        where: the file, for sentences.
    """

    name: str
    vectors: Tensor
    where: str

    def check_width(self, width: int) -> None:
        """Refuse vectors for another text encoder.

        Args:
            width: D of the text encoder.

        Raises:
            UserError
        """
        own = self.vectors.shape[1]
        if own == width:
            return
        titles = {family.context_width: family.title for family in FAMILIES} | {1280: "SDXL"}
        kind = f"is for {titles[own]}" if own in titles else "does not fit the base model"
        raise UserError(f"{kind}: its vectors are {own} wide, and the text encoder takes {width}", where=self.where)


def read_embedding(path: Path | str) -> Embedding:
    """The embedding of a file, named as the file is: AUTOMATIC1111's .pt, .safetensors, or {token: vectors} of diffusers.

    Raises:
        UserError: missing, damaged, no embedding, or one for SDXL.
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


def _vectors(file: TensorFile, keys: Mapping[str, str], where: str) -> Tensor:
    """(n, D) from the tensors of one embedding, by the names they have in it."""
    if _SECOND_ENCODER in keys:
        raise UserError(
            "is for SDXL: it has vectors for two text encoders", where=where, remedy="give one for the base model"
        )
    known = [name for name in keys if name in _KEYS]
    if len(known) != 1 and len(keys) != 1:
        what = (
            f"is no textual inversion embedding: it holds {counted(len(keys), 'tensor')} ({some_names(list(keys), _SHOWN)})"
        )
        raise UserError(what, where=where)
    key = keys[known[0]] if known else next(iter(keys.values()))
    shape = file.shape(key)
    if not 1 <= len(shape) <= 2 or 0 in shape or not file.dtype(key).is_floating_point:
        raise UserError(f"is no textual inversion embedding: {key} has the shape {list(shape)}", where=where)
    vectors = file.read(key).reshape(-1, shape[-1])
    if not torch.isfinite(vectors).all():
        raise UserError("has vectors that are no numbers (NaN or infinite)", where=where, remedy="fetch it again")
    return vectors


def add_embeddings(tokenizer: Any, text_encoder: nn.Module, embeddings: Sequence[Embedding]) -> list[str]:
    """Make embeddings words of prompts: the tokenizer learns their names, and the text encoder their vectors.

    A name with the vectors that it has already is left as it is, so that a file may be given twice.

    Returns:
        What a user should know, one sentence each.

    Raises:
        UserError: vectors of another width, and names with two meanings; all of them at once, and nothing is added then.
    """
    encoder: Any = text_encoder
    old = encoder.get_input_embeddings()
    table = old.weight.data
    known = {word: table[list(rows)] for word, rows in learned_words(tokenizer).rows.items()}
    notes, problems, added, rows = [], [], [table], {}
    count = len(table)
    for embedding in embeddings:
        word, vectors = folded(embedding.name), embedding.vectors.to(table)
        try:
            embedding.check_width(table.shape[1])
            if _is_new(embedding, vectors, known.get(word)):
                known[word], rows[word] = vectors, tuple(range(count, count + len(vectors)))
                added.append(vectors)
                count += len(vectors)
                if len(token_ids(tokenizer, word)) == 1:
                    what = f"the embedding {embedding.name} has the name of a word that the model knows"
                    notes.append(
                        f"{what}: {embedding.name!r} in a prompt is the embedding now (rename the file to keep both)"
                    )
        except UserError as error:
            problems.append(error)
    raise_all(problems)
    new = nn.Embedding.from_pretrained(torch.cat(added), freeze=not old.weight.requires_grad)
    encoder.set_input_embeddings(new.train(old.training))
    teach(tokenizer, rows)
    return notes


def _is_new(embedding: Embedding, vectors: Tensor, known: Tensor | None) -> bool:
    """Whether its name is; a `UserError` where that stands for other vectors."""
    if known is None:
        return True
    if not torch.equal(known, vectors):
        what = f"another embedding is called {embedding.name} too (capitals do not count)"
        raise UserError(what, where=embedding.where, remedy="rename one of the files")
    return False
