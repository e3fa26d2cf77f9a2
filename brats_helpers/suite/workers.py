"""Several processes, on one machine or many, on one run: who does what, and starting them.

They share nothing but the run's folder. A task is claimed by a file of its own, which its holder makes exclusively and
touches every few seconds. Where a holder died, its file is touched no more, and the next one claims the task by a file
of the next number. No claim is ever renamed or removed, so that two can never both believe that they took it over.
"""

import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from brats_helpers.files import alive, processes
from brats_helpers.log import warn

BEAT_S = 5.0
STALE_S = 60.0
"""Seconds without a touch after which a holder counts as dead; here, or in this container, it is known at once."""
POLL_S = 1.0


@contextmanager
def claimed(folder: Path, task: str) -> Iterator[bool]:
    """Hold a task unless somebody else holds it, and let go of it at the end.

    Args:
        folder: of the claims, on a disk that all processes share.
        task: a file's name.

    Returns:
        Whether it is held. A holder that was out for so long that another took over is interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claims = (re.fullmatch(re.escape(task) + r"\.(\d+)", path.name) for path in folder.iterdir())
    number = max((int(claim[1]) for claim in claims if claim), default=0)
    own = folder / f"{task}.{number + 1}"
    if number and not _is_free(folder / f"{task}.{number}"):
        yield False
        return
    try:
        with open(own, "x") as file:
            file.write(f"{processes()} {os.getpid()} on {platform.node()}")
    except FileExistsError:  # somebody was faster
        yield False
        return
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(own, folder / f"{task}.{number + 2}", over), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        over.set()
        beat.join()
        with suppress(OSError):  # then it counts as let go of by the clock
            os.utime(own, (0, 0))


@contextmanager
def awaited(folder: Path, task: str) -> Iterator[None]:
    """Hold a task as `claimed` does, however long somebody else holds it first."""
    while True:
        with claimed(folder, task) as held:
            if held:
                yield
                return
        time.sleep(POLL_S)


def _is_free(claim: Path) -> bool:
    touched = claim.stat().st_mtime
    holder = claim.read_text().split()
    if holder[:1] == [processes()] and not alive(int(holder[1])):
        return True
    # By the clock of the disk, which is the same for all.
    now = claim.with_name(f"clock-{processes()}-{os.getpid()}")
    now.touch()
    return now.stat().st_mtime - touched > STALE_S


def _beat(own: Path, next_one: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        with suppress(OSError):  # a network disk that is away for a moment
            if next_one.exists():
                warn(f"{own} was taken over, as it was not touched for {STALE_S:.0f} s: stopping here")
                os.kill(os.getpid(), signal.SIGINT)
                return
            os.utime(own)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def start(work: Callable[[list[str]], int], argv: list[str], *, workers: int, folder: Path, job: dict) -> int:
    """Start `workers` times `work(argv)` through submitit, and wait for them.

    submitit, because a fold is hours of one process: all that an engine has to do for it is to start the same command
    where there is room, and SLURM's own queue does that. Ray and Dask would add a cluster to keep alive.

    Args:
        work: returns 0 once all of the run is finished, by whichever worker.
        folder: for submitit's files, among them what each worker prints.
        job: what submitit asks of SLURM for each worker, such as `{"timeout_min": 600, "slurm_partition": "gpu"}`;
            a day each unless it says so.

    Returns:
        0 if the run is finished, else 1.

    Raises:
        ImportError: submitit is not installed.
        OSError: this machine has GPUs, and no SLURM that would give each worker its own.
    """
    import submitit

    class Worker(submitit.helpers.Checkpointable):
        """Queued again, with the same arguments, where SLURM stops it for its time or for somebody else's job."""

        def __call__(self, argv: list[str]) -> int:
            return work(argv)

    executor = submitit.AutoExecutor(folder)  # SLURM where there is one, else processes of this machine
    if executor.cluster == "local" and _has_gpu():
        raise OSError(
            "on one machine workers cannot share out its GPUs: start the same command once for each of them instead,"
            " with CUDA_VISIBLE_DEVICES=0 and so on before it; for its CPU alone with CUDA_VISIBLE_DEVICES= before it"
        )
    executor.update_parameters(**{"timeout_min": 60 * 24} | job)
    jobs = executor.map_array(Worker(), [argv] * workers)
    print(f"{workers} workers on {executor.cluster}; what they print: {jobs[0].paths.stdout} and so on", flush=True)
    codes = []
    try:
        for worker in jobs:
            try:
                codes.append(worker.result())
            except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
                warn(f"worker {worker.job_id} died: {str(error).partition(chr(10))[0]}")
    except KeyboardInterrupt:
        for worker in jobs:
            worker.cancel()
        raise
    return 0 if 0 in codes else 1
