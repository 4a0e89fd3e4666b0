"""Standard output and standard error that never end a command: what cannot be printed is noted instead."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TextIO


@dataclass
class PrintedOutput:
    """What became of the output."""

    error: OSError | None = None
    """The first error of standard output; what was printed after it is lost."""


@contextmanager
def standard_streams() -> Iterator[PrintedOutput]:
    """Inside, printing raises no error of the encoding or the disk, so no work is lost because its end cannot be shown.

    Characters that a stream's encoding lacks, such as bytes of file names that are not UTF-8, are escaped. A full or
    closed standard output is noted. One of standard error is not: there is nowhere to tell.
    """
    output = PrintedOutput()
    with ExitStack() as stack:
        stack.enter_context(_replaced("stdout", output))
        stack.enter_context(_replaced("stderr", PrintedOutput()))
        yield output


@contextmanager
def _replaced(name: str, output: PrintedOutput) -> Iterator[None]:
    stream: TextIO | None = getattr(sys, name)
    if stream is None:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            yield from _set(name, nowhere, None)
        return
    errors = stream.errors
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    try:
        yield from _set(name, _noting(stream, output), stream)
    finally:
        if isinstance(stream, io.TextIOWrapper) and errors is not None and not stream.closed:
            stream.reconfigure(errors=errors)


def _set(name: str, stream: TextIO, before: TextIO | None) -> Iterator[None]:
    setattr(sys, name, stream)
    try:
        yield
    finally:
        if getattr(sys, name) is stream:
            setattr(sys, name, before)
        if stream is not before and not stream.closed:
            stream.flush()


def _noting(stream: TextIO, output: PrintedOutput) -> TextIO:
    """A stream to the same file that notes errors; the stream itself where it has no file, or on Windows' consoles."""
    try:
        stream.flush()
        handle = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return stream
    if os.name != "posix":
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_NotingFile(handle, output)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.isatty() or stream is sys.stderr or getattr(stream, "write_through", False),
    )


class _NotingFile(io.RawIOBase):
    """Writes to an open file that it does not close, and notes the first error instead of raising it."""

    def __init__(self, handle: int, output: PrintedOutput) -> None:
        self._handle, self._output = handle, output

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        if self._output.error is None:
            try:
                return os.write(self._handle, view)
            except BlockingIOError:
                raise
            except OSError as error:
                self._output.error = error
        return view.nbytes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._handle

    def isatty(self) -> bool:
        return os.isatty(self._handle)
