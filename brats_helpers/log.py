"""The suite's log vocabulary: four marks, one line each, nothing else.

>>> done("24 patients found")            # ✅ it held, it is finished
>>> warn("2 patients left out")          # ⚠️ it goes on, but look at this
>>> fail("no data at /data/brats")       # ❌ it stops here
>>> timing("02_train", 241.3)            # ⏱ how long it took
"""

OK, WARN, FAIL, TIME = "✅", "⚠️", "❌", "⏱"


def done(text: str) -> None:
    """Print one line for something that held or is finished."""
    print(f"{OK} {text}", flush=True)


def warn(text: str) -> None:
    """Print one line for something that goes on but deserves a look."""
    print(f"{WARN} {text}", flush=True)


def fail(text: str) -> None:
    """Print one line for something that stops here."""
    print(f"{FAIL} {text}", flush=True)


def timing(what: str, seconds: float) -> None:
    """Print how long `what` took."""
    print(f"{TIME} {what}: {duration(seconds)}", flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them: `0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
