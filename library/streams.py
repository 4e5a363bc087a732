"""Every random draw of a run is a pure function of (seed, purpose, indices).

So nothing depends on the number of workers or processes, on resuming, on caching, or on what was drawn before.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed for one purpose and place; different inputs give independent seeds."""
    text = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_stream(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator, the same on every machine and device."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, purpose, *indices))


def python_stream(seed: int, purpose: str, *indices: int) -> random.Random:
    """The same for choices among Python objects (shuffles, drop-outs, wildcards)."""
    return random.Random(stream_seed(seed, purpose, *indices))
