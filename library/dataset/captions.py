"""What the text encoder reads for one image at one moment: drop-out, wildcards, shuffling, tag drop-out, warm-up.

Pure: every random choice comes from the `random.Random` given, which the caller makes from (seed, epoch, sample).
Differs from sd-scripts on purpose in one point: prefix and suffix go round the line that was chosen, not round the whole
text of several lines, where only the first line had the prefix and only the last the suffix.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

JOINER = ", "  # between tags, whatever separated them before
_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """How the captions of one subset are varied; the keys of the dataset file by the same names."""

    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0

    @property
    def varies(self) -> bool:
        """Whether an image's text may be another one at its next reading."""
        drops_out = self.caption_dropout_rate > 0 or self.caption_dropout_every_n_epochs > 0
        return drops_out or self.enable_wildcard or self.handles_tags

    @property
    def handles_tags(self) -> bool:
        """Whether captions are taken apart into tags at all."""
        return self.shuffle_caption or self.token_warmup_step > 0 or self.caption_tag_dropout_rate > 0


def process_caption(
    caption: str, settings: CaptionSettings, draws: random.Random, *, epoch: int, step: int = 0, max_train_steps: int = 0
) -> str:
    """The text for one reading of an image.

    Args:
        caption: one line, or several alternatives on lines of their own.
        draws: the random choices of this reading.
        epoch: counted from 1, so that "every 3rd epoch" is 3, 6, 9.
        step: optimizer steps done before this reading; only for token warm-up.
        max_train_steps: length of the run; only for a warm-up given as a fraction of it.
    """
    if settings.caption_dropout_rate > 0 and draws.random() < settings.caption_dropout_rate:
        return ""
    if settings.caption_dropout_every_n_epochs > 0 and epoch % settings.caption_dropout_every_n_epochs == 0:
        return ""
    lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    text = draws.choice(lines) if settings.enable_wildcard else lines[0]
    text = " ".join(part for part in (settings.caption_prefix, text, settings.caption_suffix) if part)
    if settings.enable_wildcard:
        text = expand_wildcards(text, draws)
    if settings.handles_tags:
        text = vary_tags(text, settings, draws, warmup_share=warmup_share(settings, step, max_train_steps))
    if settings.secondary_separator:
        text = text.replace(settings.secondary_separator, settings.caption_separator)
    return text


def expand_wildcards(text: str, draws: random.Random) -> str:
    """`{red|blue} car` becomes one of the two; `{{` and `}}` are the braces themselves. One level, not nested."""

    def expand(match: re.Match[str]) -> str:
        alternatives = match.group(1)
        return match.group(0)[0] if alternatives is None else draws.choice(alternatives.split("|"))

    return _WILDCARD.sub(expand, text)


def warmup_share(settings: CaptionSettings, step: int, max_train_steps: int) -> float:
    """How far token warm-up has come, 0..1; 1 without one. A warm-up below 1 is a fraction of the run."""
    length = settings.token_warmup_step
    if 0 < length < 1:
        length *= max_train_steps
    return 1.0 if length <= 0 else min(1.0, step / length)


def vary_tags(text: str, settings: CaptionSettings, draws: random.Random, *, warmup_share: float) -> str:
    """Shuffle and drop the flexible tags of a caption; what is kept stays in front, a fixed tail at the end.

    During warm-up only the first of the flexible tags are used: `token_warmup_min` at the start, all at the end.
    """
    fixed, flexible, tail = split_tags(text, settings)
    if warmup_share < 1:
        allowed = math.floor(warmup_share * (len(flexible) - settings.token_warmup_min)) + settings.token_warmup_min
        flexible = flexible[: max(0, allowed)]
    if settings.shuffle_caption:
        draws.shuffle(flexible)
    if settings.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if draws.random() >= settings.caption_tag_dropout_rate]
    return JOINER.join(fixed + flexible + tail)


def split_tags(text: str, settings: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """(fixed, flexible, fixed tail): parted by keep_tokens_separator where it occurs, else by keep_tokens."""

    def tags(part: str) -> list[str]:
        return [tag.strip() for tag in part.split(settings.caption_separator) if tag.strip()]

    if settings.keep_tokens_separator and settings.keep_tokens_separator in text:
        fixed, flexible, *tail = text.split(settings.keep_tokens_separator, 2)
        return tags(fixed), tags(flexible), tags(tail[0]) if tail else []
    all_tags = tags(text)
    return all_tags[: settings.keep_tokens], all_tags[settings.keep_tokens :], []


def join_caption_and_tags(caption: str, tags: str, separator: str) -> str:
    """The caption of a metadata entry: its tags go to the end of every line of its caption."""
    tags = separator.join(line for line in tags.splitlines() if line.strip())
    lines = [line for line in caption.splitlines() if line.strip()]
    if not tags or not lines:
        return "\n".join(lines) or tags
    return "\n".join(line + separator + tags for line in lines)


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """How often each tag occurs, in order of first appearance; parted by commas, lower-cased (ss_tag_frequency)."""
    counts: dict[str, int] = {}
    for caption in captions:
        for tag in caption.replace("\n", ",").split(","):
            tag = tag.strip().lower()
            if tag:
                counts[tag] = counts.get(tag, 0) + 1
    return counts
