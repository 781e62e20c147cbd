"""A small progress bar on stderr for steps that take seconds; plain lines where stderr is not a terminal."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

WIDTH = 24
REDRAW_SECONDS = 0.25


class Progress:
    """Shows that a step is alive: a bar, a label and the seconds since it began.

    The bar moves with :meth:`advance`; the seconds move by themselves, because one MLX evaluation can take a minute and
    reports nothing while it runs.

    Args:
        label: What is being done.
        total: Amount of work in any unit.
        stream: Where to draw; stderr by default.
    """

    def __init__(self, label: str, total: float, stream: TextIO | None = None):
        self.label = label
        self._total = max(total, 1e-9)
        self._done = 0.0
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._drawn = 0
        self._thread = threading.Thread(target=self._redraw, daemon=True) if self._live else None

    def __enter__(self) -> Progress:
        if self._thread is not None:
            self._thread.start()
        else:
            print(f"{self.label} ...", file=self._stream, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._erase()

    def advance(self, amount: float, label: str | None = None) -> None:
        """Count ``amount`` as done and, if given, change the label."""
        with self._lock:
            self._done += amount
            self.label = label or self.label
        if label is not None and not self._live:
            print(f"  {label} ...", file=self._stream, flush=True)

    def _redraw(self) -> None:
        while not self._stop.wait(REDRAW_SECONDS):
            with self._lock:
                filled = int(WIDTH * min(self._done / self._total, 1.0))
                label = self.label
            seconds = time.monotonic() - self._start
            line = f"[{'#' * filled}{'.' * (WIDTH - filled)}] {seconds:4.0f} s  {label}"
            self._stream.write("\r" + line.ljust(self._drawn))
            self._stream.flush()
            self._drawn = len(line)

    def _erase(self) -> None:
        self._stream.write("\r" + " " * self._drawn + "\r")
        self._stream.flush()
