"""Texts to conditions with CLIP's text encoders: tokens in chunks of 75, encoded chunk by chunk, weighted where asked.

Shapes: B texts, n chunks, 77 tokens a chunk (start, 75 of the text, end), D the encoder's width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from library.conditioning import prompt_weights
from library.conditioning.condition import Condition
from library.conditioning.learned_words import learned_words

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CHUNK = 75
COMMA_REACH = 20
"""How many tokens before the end of a full chunk a comma is looked for; A1111's default."""

WeightedTokens = list[tuple[int, float]]
WeightMode = Literal["multiply", "keep_mean"]

_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of a batch.

    Attributes:
        ids: (B, n, 77), int64.
        weights: (B, n, 77), fp32; None where every weight is 1 by right.
    """

    ids: Tensor
    weights: Tensor | None = None


def token_ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """The tokens of a text, without start, end and padding, however many; learned words are theirs (`learned_words`).

    SD2 pads with "!", so that its tokenizer would read every "!" of a text as padding. The model was not trained that way:
    OpenCLIP's tokenizer reads the character, as the web UIs do. So there special tokens are not looked for in texts.
    """
    pad_is_text = tokenizer.pad_token not in (tokenizer.bos_token, tokenizer.eos_token)
    settings: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": pad_is_text, "verbose": False}
    ids: list[int] = []
    for piece in learned_words(tokenizer).split(text):
        ids += tokenizer(piece, **settings).input_ids if isinstance(piece, str) else piece
    return ids


def tokenize(
    tokenizer: CLIPTokenizer, texts: Sequence[str], *, max_length: int = CHUNK, weighted: bool = False
) -> TokenBatch:
    """Tokens of texts, cut off at `max_length` and laid out in chunks.

    Args:
        tokenizer: says by its pad token how the rest of a chunk is filled.
        texts: B of them; an empty text is a text of no tokens.
        max_length: 75, 150 or 225 tokens; every text gets as many chunks as that takes.
        weighted: read weights in the texts (`prompt_weights`).

    Raises:
        ValueError: for a length that is not a multiple of 75.
    """
    if max_length < CHUNK or max_length % CHUNK:
        raise ValueError(f"max_length must be a multiple of {CHUNK}, not {max_length}")
    ids, weights = [], []
    for text in texts:
        parts = prompt_weights.parse(text) if weighted else [(text, 1.0)]
        tokens = [(token, weight) for part, weight in parts for token in token_ids(tokenizer, part)][:max_length]
        ids.append(_in_chunks([token for token, _ in tokens], max_length, tokenizer))
        weights.append(_weights_in_chunks([weight for _, weight in tokens], max_length))
    return TokenBatch(torch.tensor(ids), torch.tensor(weights) if weighted else None)


def text_chunks(tokenizer: CLIPTokenizer, text: str, *, breaks: bool) -> list[WeightedTokens]:
    """A prompt's tokens and their weights, in chunks of 75 at most, as A1111 cuts them; one chunk at least.

    A chunk that overflows ends behind its last comma, if that is among its last 20 tokens: what belongs together stays
    together.

    Args:
        breaks: `BREAK` ends a chunk, in brackets too; without it the word is text.
    """
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    chunks: list[WeightedTokens] = [[]]
    for part, weight in prompt_weights.parse(text):
        for number, piece in enumerate(_BREAK.split(part) if breaks else [part]):
            if number:
                chunks.append([])
            for token in token_ids(tokenizer, piece):
                if len(chunks[-1]) == CHUNK:
                    chunks.append([] if token == comma else _cut_behind_comma(chunks[-1], comma))
                chunks[-1].append((token, weight))
    # a BREAK at the end has nothing to begin
    return chunks if chunks[-1] else chunks[:-1] or chunks


def _cut_behind_comma(chunk: WeightedTokens, comma: int) -> WeightedTokens:
    """Take what follows the last comma out of a full chunk; nothing where that comma is far from the end, or absent."""
    for behind in range(CHUNK, CHUNK - COMMA_REACH, -1):
        if chunk[behind - 1][0] == comma:
            cut = chunk[behind:]
            del chunk[behind:]
            return cut
    return []


def chunk_batch(tokenizer: CLIPTokenizer, texts: Sequence[list[WeightedTokens]], *, chunks: int) -> TokenBatch:
    """Texts from `text_chunks`, each chunk laid out as start, tokens, end, padding.

    Args:
        texts: B of them.
        chunks: n, for every text; one with fewer gets empty ones, and one with more loses the rest.
    """
    start, end, pad = _special_tokens(tokenizer)
    ids = torch.full((len(texts), chunks, CHUNK + 2), pad)
    ids[:, :, 0] = start
    weights = torch.ones(ids.shape)
    for place, text in enumerate(texts):
        for number in range(chunks):
            tokens = text[number] if number < len(text) else []
            ids[place, number, 1 : len(tokens) + 2] = torch.tensor([*(token for token, _ in tokens), end])
            weights[place, number, 1 : len(tokens) + 1] = torch.tensor([weight for _, weight in tokens])
    return TokenBatch(ids, weights)


def _in_chunks(tokens: list[int], max_length: int, tokenizer: CLIPTokenizer) -> list[list[int]]:
    """The layout that sd-scripts trains with, chunk by chunk.

    The text with its end and padding is made as one long row; each chunk is start, the next 75, and the row's last token.
    Where padding is not the end token (SD2), a full chunk gets an end, and one without text gets it right behind its start.
    """
    start, end, pad = _special_tokens(tokenizer)
    row = [*tokens, end] + [pad] * (max_length - len(tokens))
    if max_length == CHUNK:
        return [[start, *row]]
    chunks = [[start, *row[first : first + CHUNK], row[-1]] for first in range(0, max_length, CHUNK)]
    if pad != end:
        for chunk in chunks:
            if chunk[-2] not in (end, pad):
                chunk[-1] = end
            if chunk[1] == pad:
                chunk[1] = end
    return chunks


def _special_tokens(tokenizer: CLIPTokenizer) -> tuple[int, int, int]:
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if start is None or end is None or pad is None:
        raise ValueError("the tokenizer lacks a start, end or pad token")
    return int(start), int(end), int(pad)


def _weights_in_chunks(weights: list[float], max_length: int) -> list[list[float]]:
    row = weights + [1.0] * (max_length - len(weights))
    return [[1.0, *row[first : first + CHUNK], 1.0] for first in range(0, max_length, CHUNK)]


@dataclass(frozen=True)
class Layers:
    """Which layer's output counts.

    Attributes:
        from_end: 1 for the last.
        final_norm: the encoder's final norm follows.
    """

    from_end: int = 1
    final_norm: bool = True


LAST_LAYER = Layers()


def encode(
    text_encoder: nn.Module,
    tokens: TokenBatch,
    *,
    layers: Layers = LAST_LAYER,
    weight_mode: WeightMode = "multiply",
    whole_chunks: bool = False,
    pooled_at: int | None = None,
) -> Condition:
    """Conditions of a batch of tokens.

    Args:
        text_encoder: a CLIPTextModel, or a CLIPTextModelWithProjection; gradients flow into it where they are enabled.
        tokens: from `tokenize`.
        layers: whose output is the context.
        weight_mode: "multiply" scales each token's vector (training); "keep_mean" then scales the whole so that its mean is
            what it was without weights, as AUTOMATIC1111 does (generation).
        whole_chunks: keep start and end of every chunk, as programs that draw pictures do; training leaves out inner ones.
        pooled_at: the token whose last features, projected, stand for the whole text: its first in the first chunk, which is
            the text's end; None for an encoder without projection.

    Returns:
        context: (B, n * 75 + 2, D): the start, the 75 tokens of every chunk, the last one's end; or (B, n * 77, D), whole
        chunks. pooled: (B, P). In the encoder's dtype and device.

    Raises:
        ValueError: for a layer that the encoder does not have.
    """
    count, chunks, _ = tokens.ids.shape
    device = next(text_encoder.parameters()).device
    ids = tokens.ids.to(device)
    hidden, last = _hidden_states(text_encoder, ids.flatten(0, 1), layers)
    pooled = None
    if pooled_at is not None:
        ends = (ids[:, 0] == pooled_at).int().argmax(dim=-1)
        of_ends = last.unflatten(0, (count, chunks))[torch.arange(count, device=device), 0, ends]
        pooled = text_encoder.get_submodule("text_projection")(of_ends)
    join = partial(torch.flatten, start_dim=1, end_dim=2) if whole_chunks else _joined
    joined = join(hidden.unflatten(0, (count, chunks)))
    if tokens.weights is not None:
        joined = _weighted(joined, join(tokens.weights.to(device)), weight_mode)
    return Condition(joined, pooled)


def _hidden_states(text_encoder: Any, ids: Tensor, layers: Layers) -> tuple[Tensor, Tensor]:
    """(chunks, 77) -> (chunks, 77, D) of the layer, and of the last one with the final norm."""
    count = text_encoder.config.num_hidden_layers
    if not 1 <= layers.from_end <= count:
        raise ValueError(f"clip_skip must be 1 to {count}, the text encoder's layers, not {layers.from_end}")
    # What projects is built around what does not; transformers before 5.6 has that level in both.
    whole = getattr(text_encoder, "text_model", text_encoder)
    if layers == LAST_LAYER:
        last = whole(ids).last_hidden_state
        return last, last
    outputs = whole(ids, output_hidden_states=True)
    hidden = outputs.hidden_states[-layers.from_end]
    return whole.final_layer_norm(hidden) if layers.final_norm else hidden, outputs.last_hidden_state


def _joined(chunks: Tensor) -> Tensor:
    """Chunks as one row: (B, n, 77, ...) -> (B, n * 75 + 2, ...), keeping the first start and the last end."""
    return torch.cat([chunks[:, 0, :1], chunks[:, :, 1:-1].flatten(1, 2), chunks[:, -1, -1:]], dim=1)


def _weighted(hidden: Tensor, weights: Tensor, mode: WeightMode) -> Tensor:
    """(B, L, D) with (B, L); in fp32 for the means, which half precision would round."""
    scaled = hidden * weights.unsqueeze(-1).to(hidden.dtype)
    if mode == "multiply" or bool((weights == 1).all()):
        return scaled
    before, after = (states.float().mean(dim=(1, 2), keepdim=True) for states in (hidden, scaled))
    return (scaled.float() * (before / after)).to(hidden.dtype)
