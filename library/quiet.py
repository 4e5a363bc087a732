"""Messages that other libraries print at import and that say nothing about the user's run."""

from __future__ import annotations

import logging


def quiet_libraries() -> None:
    """Call before importing diffusers or transformers.

    bitsandbytes, imported by diffusers wherever it is installed, warns about an optional 4-bit kernel of the CPU.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
