"""How far a training is, and whether an interrupted one can be resumed."""

from pathlib import Path

from brats_helpers.log import warn
from brats_helpers.training.checkpoint import CheckpointError, read_checkpoint
from brats_helpers.training.settings import shown


def resumable(path: Path, origin: dict) -> dict | None:
    """The checkpoint at `path` if it is of the same settings and patients; else a warning that says what differs."""
    if not path.exists():
        return None
    try:
        saved = read_checkpoint(path)
    except CheckpointError as error:
        warn(f"{error} The training starts afresh.")
        return None
    now, then = origin["settings"] | origin, saved["settings"] | saved
    may_differ = ("settings", "minutes")
    differ = [name for name in now if name not in may_differ and now[name] != then.get(name)]
    if not differ:
        return saved
    changes = ", ".join(
        name if name.endswith("_cases") else f"{name} {shown(then.get(name))} then, {shown(now[name])} now"
        for name in differ
    )
    warn(f"{path} is of another training ({changes}): starting afresh")
    return None
