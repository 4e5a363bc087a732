"""What every script does around its own work: sentences instead of tracebacks, and the exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, cast

from library.checkpoints.atomic import tidy_when_ended
from library.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def run_door(name: str, work: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a script's work on its command line.

    A `UserError` becomes its sentences on stderr and exit status 2; Ctrl-C becomes one line and 130. Everything else is a
    defect of ours and keeps its traceback. However it ends, by a signal too, no unfinished file stays. The work goes on
    where nobody reads what it prints any more (`... | head -1`).
    """
    tidy_when_ended()
    try:
        with _output_that_may_be_closed():
            return work(list(sys.argv[1:] if argv is None else argv)) or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # the processes of one run share a screen
            for sentence in str(error).splitlines():
                print(f"{name}: {sentence}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"\n{name}: stopped by Ctrl-C", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def _output_that_may_be_closed() -> Iterator[None]:
    """Have what is printed go nowhere from the moment that its reader has closed the pipe."""
    stream = sys.stdout
    if stream is None:  # Python's own way to say that it was closed from the start
        yield
        return
    output = _Output(stream)
    with contextlib.redirect_stdout(cast(IO[str], output)):
        try:
            yield
        finally:
            output.flush()


class _Output:
    """A stream that outlives its reader; all but writing is the stream's own."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._write_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._write_nowhere()

    def _write_nowhere(self) -> None:
        """Swap the descriptor, so that what still waits in buffers, which Python writes when it ends, fails no more."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
