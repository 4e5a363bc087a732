"""What every script does around its own work: sentences instead of tracebacks, and the exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from library.checkpoints.atomic import tidy_when_ended
from library.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def run_door(name: str, work: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a script's work on its command line.

    A `UserError` becomes its sentences on stderr and exit status 2; Ctrl-C becomes one line and 130. Everything else is a
    defect of ours and keeps its traceback. However it ends, by a signal too, no unfinished file stays.
    """
    tidy_when_ended()
    try:
        return work(list(sys.argv[1:] if argv is None else argv)) or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # the processes of one run share a screen
            for sentence in str(error).splitlines():
                print(f"{name}: {sentence}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"\n{name}: stopped by Ctrl-C", file=sys.stderr)
        return EXIT_INTERRUPTED
