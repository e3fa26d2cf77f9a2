"""Start the training of a run: in this process, or in several that share each batch, one per GPU.

Several processes are started by torchrun, each of which runs `python -m brats_helpers train RUN`. The same command
under `accelerate launch` or torchrun trains on several machines that see the same folders. A notebook does not fork
(accelerate's notebook_launcher): that cannot be done once the notebook has touched a GPU, as it has when it chose it.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from brats_helpers.data.cache import Packed, load
from brats_helpers.files import alive, read_json, write_json
from brats_helpers.log import FAIL
from brats_helpers.runs import Run
from brats_helpers.training.loop import fit, stoppable
from brats_helpers.training.settings import Settings

JOB = "training.json"
"""In a run's folder: the instructions for its training processes."""
_STARTED_BY = "BRATS_STARTED_BY"


@stoppable()
def launch(
    run: Run,
    settings: Settings,
    train: Sequence[Packed],
    val: Sequence[Packed],
    *,
    processes: int,
    device: torch.device,
    facts: Mapping | None = None,
    follow: Callable[[list[dict]], None] | None = None,
    **how,
) -> list[dict[str, float]]:
    """Train in the folder of `run`, see `loop.fit`.

    Args:
        run: whose patients `train` and `val` are.
        settings: how to train.
        train: prepared cases to learn from.
        val: prepared cases to choose the epoch by.
        processes: number of processes that share each batch; 0: one per GPU, or fewer if they cannot share it evenly.
        device: the device to train on.
        facts: see `loop.fit`.
        follow: called with the rows of `history.csv` so far after every epoch.
        how: `workers` (of each process), `checkpoint_minutes`, `deterministic` and `tracker` of `fit`.

    Raises:
        RuntimeError: one of several processes failed; the message repeats its error.
    """
    if not processes:
        gpus = torch.cuda.device_count() if device.type == "cuda" else 1
        processes = max(n for n in range(1, max(gpus, 1) + 1) if settings.batch_size % n == 0)
    if processes == 1:
        return fit(settings, train, val, run.folder, device=device, facts=facts, follow=follow, **how)

    job = {"settings": asdict(settings), "device": device.type, "how": how | {"facts": facts}}
    job |= {"train": list(map(_place_of, train)), "val": list(map(_place_of, val))}
    write_json(run.folder / JOB, job)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "brats_helpers", "train", str(run.folder)]
    failures: list[str] = []
    cores = max((os.cpu_count() or 1) // processes, 1)
    environ = {"OMP_NUM_THREADS": str(cores)} | os.environ
    environ |= {_STARTED_BY: str(os.getpid()), "PYTHONIOENCODING": "utf-8"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8") as process,
    ):
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith(FAIL):
                    failures.append(line.removeprefix(FAIL).strip())
                if follow and line.startswith("epoch "):
                    follow(_history(run))
        except KeyboardInterrupt:
            process.terminate()
            raise
        if process.wait():
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip()[-2000:]
            # The first to fail is the cause: the others lose their connection to it.
            raise RuntimeError(f"the training failed in one of {processes} processes. {(failures or [said])[0]}")
    return _history(run)


def _place_of(case: Packed) -> str:
    """The folder of a prepared case in the cache."""
    return str(Path(case.images.filename).parent)


def train_run(run: Run) -> None:
    """Follow the instructions of `launch`: one process of several, started by torchrun or `accelerate launch`.

    Only the main process prints, except for errors.

    Raises:
        SystemExit: the training failed; the reason has been printed.
    """
    if _STARTED_BY in os.environ:
        _end_with(int(os.environ[_STARTED_BY]))
    job = read_json(run.need(run.folder / JOB, "02_train with -p processes 2, or more,"))
    rank, out = int(os.environ.get("RANK", 0)), sys.stdout
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, open as long as the process lives
    index = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", index) if job["device"] == "cuda" else torch.device("cpu")
    try:
        train, val = (list(map(load, map(Path, job[part]))) for part in ("train", "val"))
        fit(Settings(**job["settings"]), train, val, run.folder, device=device, **job["how"])
    except Exception as error:
        print(f"{FAIL} process {rank}: {' '.join(str(error).split()) or repr(error)}", file=out, flush=True)
        traceback.print_exc()
        raise SystemExit(1) from None


def _end_with(process: int) -> None:
    """End this process when another one is gone, as after `kill -9`: the next training uses the same folder."""

    def watch():
        while alive(process):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _history(run: Run) -> list[dict[str, float]]:
    return pd.read_csv(run.history).to_dict("records")
