"""Recognise a file that was read before, without reading it again."""

import hashlib
from pathlib import Path

_BLOCKS, _BLOCK_BYTES = 8, 4096


def stamp(path: Path) -> list:
    """Return the name, size, time of modification and a hash of samples of a file.

    Equal stamps stand for equal content. They survive moving, remounting and `chmod`. Files of one size and time that
    swapped names differ in the samples. A file whose stamp changed may still have the same content: read it.

    Raises:
        OSError: the file is gone. One that cannot be opened has no samples.
    """
    facts = path.stat()
    try:
        sample = _sample(path, facts.st_size)
    except OSError:
        sample = None
    return [path.name, facts.st_size, facts.st_mtime_ns, sample]


def _sample(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    last = max(size - _BLOCK_BYTES, 0)
    with open(path, "rb") as file:
        for k in range(_BLOCKS):
            file.seek(last * k // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]
