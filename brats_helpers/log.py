"""The suite's log vocabulary: four marks, one line each, nothing else.

>>> done("24 patients found")            # ✅ true, or finished
>>> warn("2 patients left out")          # ⚠️ continues, but deserves a look
>>> fail("no data at /data/brats")       # ❌ stops here
>>> timing("02_train", 241.3)            # ⏱ duration

A terminal whose encoding lacks the marks shows `[ok]`, `[warning]`, `[error]` and `[time]` instead.
"""

import codecs
import io
import sys

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
