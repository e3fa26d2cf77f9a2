"""Time the audit of a patient beside just reading the bytes it needs, and say where the time goes.

Takes patients of DATA as they are packed there, and as plain .nii. Figures in ms a patient, one thread unless said,
wall clock and in brackets processor time:

    read        the bytes of all files, already in memory / dropped from it before (cold)
    audit       everything `python -m brats_helpers check` does with a patient / cold / cold, by two threads
    unpack      of the audit: reading, and gunzip of what is gzip
    hash        of the audit: hashing the voxels
    checks      of the audit: all the rest, which is header, range, labels, geometry, brain
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

from brats_helpers.data import audit
from brats_helpers.data.cases import Survey, survey
from brats_helpers.data.nifti import read_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", type=Path, help="a folder of patients, such as simulated ones")
    parser.add_argument("--modalities", metavar="LIST", default="flair,t1,t1ce,t2", help="default: all four")
    parser.add_argument("--patients", metavar="N", type=int, default=6, help="how many of them (default 6)")
    parser.add_argument("--repeats", metavar="N", type=int, default=5, help="timings, of which the median counts")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there as well")
    options = parser.parse_args()
    results = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "ms_a_patient": {}}
    with tempfile.TemporaryDirectory() as folder:
        found = survey(options.data, options.modalities.split(","))
        plain = unpacked(found, Path(folder), options.patients)
        for name, patients in {"as packed": found, "plain .nii": plain}.items():
            rows = measure(patients, options.patients, options.repeats)
            results["ms_a_patient"][name] = rows
            print(f"{name}: " + ", ".join(f"{row} {wall:.0f} ({cpu:.0f})" for row, (wall, cpu) in rows.items()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def unpacked(found: Survey, folder: Path, n: int) -> Survey:
    for case in found.cases[:n]:
        (folder / case.id).mkdir()
        for path in case.files.values():
            (folder / case.id / path.name.removesuffix(".gz")).write_bytes(read_bytes(path)[0])
    return survey(folder, found.modalities)


def measure(found: Survey, n: int, repeats: int) -> dict[str, list[float]]:
    cases = found.cases[:n]
    paths = [path for case in cases for path in case.files.values()]

    def read():
        for path in paths:
            path.read_bytes()

    def check(workers=1):
        audit.examine(found, cases, workers=workers, cache_dir=None)

    rows = {}
    for name, work, cold in (
        ("read", read, False), ("read cold", read, True), ("audit", check, False), ("audit cold", check, True),
        ("audit cold by two", partial(check, workers=2), True),
    ):  # fmt: skip
        clocks = [clocked(work, paths if cold else ()) for _ in range(repeats)]
        rows[name] = [statistics.median(clock) * 1000 / len(cases) for clock in zip(*clocks, strict=True)]
    for name, function in (("unpack", "read_bytes"), ("hash", "_content")):
        spent: list[tuple[float, float]] = []
        with patch.object(audit, function, timed(getattr(audit, function), spent)):
            for _ in range(repeats):
                check()
        rows[name] = [sum(clock) * 1000 / repeats / len(cases) for clock in zip(*spent, strict=True)]
    return rows | {"checks": [rows["audit"][k] - rows["unpack"][k] - rows["hash"][k] for k in range(2)]}


def clocked(work, dropped) -> tuple[float, float]:
    """Seconds by the wall and of the processor; `dropped` files have to come from the disk."""
    for path in dropped:
        with open(path, "rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def timed(function, into: list[tuple[float, float]]):
    def wrapped(*args):
        wall, cpu = time.perf_counter(), time.process_time()
        result = function(*args)
        into.append((time.perf_counter() - wall, time.process_time() - cpu))
        return result

    return wrapped


if __name__ == "__main__":
    main()
