"""The suite's log vocabulary: four marks, one line each, nothing else.

>>> done("24 patients found")            # ✅ true, or finished
>>> warn("2 patients left out")          # ⚠️ continues, but deserves a look
>>> fail("no data at /data/brats")       # ❌ stops here
>>> timing("02_train", 241.3)            # ⏱ duration

A terminal whose encoding lacks the marks shows `[ok]`, `[warning]`, `[error]` and `[time]` instead.
"""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # before anything is installed, the command line needs the rest
    from tqdm import tqdm

OK, WARN, FAIL, TIME = "✅", "⚠️", "❌", "⏱"
_WORDS = {OK: "[ok]", WARN: "[warning]", FAIL: "[error]", TIME: "[time]"}
_PLAINLY = "brats_helpers.log"


def done(text: str) -> None:
    """Print one line for something that is true or finished."""
    _print(f"{OK} {text}")


def warn(text: str) -> None:
    """Print one line for something that continues but deserves a look."""
    _print(f"{WARN} {text}")


def fail(text: str) -> None:
    """Print one line for something that stops here."""
    _print(f"{FAIL} {text}")


def timing(what: str, seconds: float) -> None:
    """Print how long `what` took."""
    _print(f"{TIME} {what}: {duration(seconds)}")


def _print(text: str) -> None:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, _PLAINLY).decode(encoding), flush=True)


def watched() -> bool:
    """Whether a person is watching: in a notebook whose front end allows input, or at a terminal.

    papermill and nbval run notebooks without input.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if hasattr(shell, "kernel"):
        request = shell.get_parent()  # the message that started this cell
        return bool(request.get("content", {}).get("allow_stdin"))
    return sys.stdout.isatty()


def progress(
    items: Iterable | None, *, what: str, total: float, unit: str = "patient", first: int = 0, terminal: bool = False
) -> tqdm:
    """A bar with the time left over `items` where a person watches a notebook; elsewhere the items alone.

    Args:
        items: to hand out one by one; None if the caller counts with `update`.
        what: is being done, such as `preparing`.
        total: number of items.
        unit: what one item is.
        first: items that are done already.
        terminal: show the bar at a terminal too; only where nothing is printed meanwhile.
    """
    from tqdm.auto import tqdm

    shown = watched() and (terminal or "ipykernel" in sys.modules)
    return tqdm(items, desc=what, total=total, unit=unit, initial=first, leave=False, disable=not shown)


def fit_terminal() -> None:
    """Replace characters that the terminal's encoding lacks, from now on, instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_PLAINLY)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: marks become words, and other characters `?`."""
    lacking = error.object[error.start : error.end]
    for mark, word in _WORDS.items():
        lacking = lacking.replace(mark, word)
    return "".join(letter if letter.isascii() else "?" for letter in lacking), error.end


codecs.register_error(_PLAINLY, _plain)


def duration(seconds: float) -> str:
    """Return seconds in words for people: `0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
