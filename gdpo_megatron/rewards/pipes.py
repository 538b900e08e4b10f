"""Ends of pipes that never block: lines come in, bytes go out, the rest waits its turn."""

from __future__ import annotations

import os
from collections.abc import Callable
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector

_CHUNK = 1 << 16


class Inbox:
    """The end of a pipe that is read from.

    Args:
        selector: tells when there is something; the key's data is a function to call then. None
            leaves that to the owner, who calls `take`.
        fd: the pipe; closed by `close`.
        on_bytes: called with what came.
        on_end: called once when nothing will come any more.
    """

    def __init__(
        self,
        selector: BaseSelector | None,
        fd: int,
        on_bytes: Callable[[bytes], None],
        on_end: Callable[[], None] = lambda: None,
    ):
        os.set_blocking(fd, False)
        self._selector, self._fd, self._on_bytes, self._on_end = selector, fd, on_bytes, on_end
        self._open = True
        if selector is not None:
            selector.register(fd, EVENT_READ, self.read)

    def read(self) -> None:
        """Take what is there."""
        if not self._open:
            return
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return
        if data:
            self._on_bytes(data)
        else:
            self.close()
            self._on_end()

    def take(self) -> None:
        """Take all that is there."""
        while self._open:
            try:
                data = os.read(self._fd, _CHUNK)
            except BlockingIOError:
                break
            if not data:
                break
            self._on_bytes(data)

    def drain(self) -> None:
        """Take all that is there, then close; for a pipe whose writer is dead."""
        self.take()
        self.close()

    def close(self) -> None:
        """Stop reading."""
        if self._open:
            self._open = False
            if self._selector is not None:
                self._selector.unregister(self._fd)
            os.close(self._fd)


class Lines:
    """Makes lines of the bytes that come; for `Inbox.on_bytes`."""

    def __init__(self, on_line: Callable[[bytes], None]):
        self._on_line = on_line
        self._parts: list[bytes] = []

    def __call__(self, data: bytes) -> None:
        *ends, rest = data.split(b"\n")
        for end in ends:
            whole = b"".join([*self._parts, end])
            self._parts = []
            self._on_line(whole)
        if rest:
            self._parts.append(rest)


class Outbox:
    """The end of a pipe that is written to; what does not fit is kept until there is room.

    A reader that is gone is not an error here: its end is seen elsewhere.
    """

    def __init__(self, selector: BaseSelector, fd: int):
        os.set_blocking(fd, False)
        self._selector, self._fd = selector, fd
        self._waiting = bytearray()
        self._open = True

    def send(self, data: bytes) -> None:
        """Write, now or later."""
        if not self._open:
            return
        was_waiting = bool(self._waiting)
        self._waiting += data
        if not was_waiting:
            self._write()
            if self._open and self._waiting:
                self._selector.register(self._fd, EVENT_WRITE, self._continue)

    def close(self) -> None:
        """Write no more."""
        if self._open:
            self._open = False
            if self._waiting and self._fd in self._selector.get_map():
                self._selector.unregister(self._fd)
            os.close(self._fd)

    def _write(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(self._fd, self._waiting)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.close()

    def _continue(self) -> None:
        self._write()
        if self._open and not self._waiting:
            self._selector.unregister(self._fd)
