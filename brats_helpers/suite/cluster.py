"""Folds and combinations as tasks of a Dask cluster, on this machine or on any other.

Dask gives each task to a free worker, and to another one if that worker dies; notebook 02 then continues from its
`last.pt`. The workers need the checkout and the run's folder under the same paths as here.
"""

import contextlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from brats_helpers.log import done, duration, fail
from brats_helpers.runs import Run
from brats_helpers.suite.plan import Plan

LOG = "log.txt"
"""In the folder of a fold or combination: what its notebooks printed on a worker."""
CONNECT_S = 30


class ClusterError(Exception):
    """The requested cluster is not available; the message says why and what to do."""


def run_on_cluster(plan: Plan, work: Callable[[Plan], bool], plans: Sequence[Plan]) -> list[Plan]:
    """Call `work` with each of `plans` on the plan's cluster; return the plans that failed."""
    failed = {own.folder: own for own in plans}
    try:
        with _client(plan) as client:
            start = time.monotonic()
            for folder, error in _results(client, work, plans):
                name, log = Run(folder).name, folder / LOG
                if error:
                    fail(f"{name}: {error}\n   What it printed: {log}")
                else:
                    done(f"{name}: finished after {duration(time.monotonic() - start)}; what it printed: {log}")
                    failed.pop(folder)
    except ClusterError as error:
        fail(str(error))
    return list(failed.values())


def _results(client, work, plans):
    """Yield the folder and the error, or "", of each task as it finishes."""
    from distributed import as_completed

    futures = {client.submit(_logged, work, own, pure=False): own.folder for own in plans}
    for future in as_completed(futures):
        error = future.exception()
        if error is not None:
            yield futures[future], f"{type(error).__name__}: {error}"
        else:
            yield futures[future], "" if future.result() else "a notebook failed"


def _logged(work: Callable[[Plan], bool], plan: Plan) -> bool:
    """In a worker: call `work`, and append what it prints to the log of the fold."""
    os.chdir(plan.root)
    with open(plan.folder / LOG, "a", encoding="utf-8", buffering=1) as log, contextlib.redirect_stdout(log):
        return work(plan)


@contextlib.contextmanager
def _client(plan: Plan):
    if importlib.util.find_spec("distributed") is None:
        raise ClusterError(
            f"--workers and --scheduler need Dask: {sys.executable} -m pip install 'dask[distributed]'. Without them"
            " the folds run one after another."
        )
    from distributed import Client

    with contextlib.ExitStack() as stack:
        if plan.workers:
            where = {"address": stack.enter_context(_local_cluster(plan.workers))}
            print(f"{plan.workers} workers on this machine", flush=True)
        else:
            kind = "scheduler_file" if Path(plan.scheduler).is_file() else "address"
            where = {kind: plan.scheduler}
        try:
            client = stack.enter_context(Client(**where, timeout=CONNECT_S))
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"no Dask scheduler answers at {plan.scheduler} ({error}). Start one with `dask scheduler`, and give"
                " the address that it prints, such as tcp://10.0.0.1:8786, or its scheduler file."
            ) from None
        if busy := {worker: n for worker, n in client.nthreads().items() if n > 1}:
            raise ClusterError(
                f"the worker at {min(busy)} has {busy[min(busy)]} threads, so it would train as many folds at once in"
                " one process. Start every worker with --nthreads 1."
            )
        yield client


def _local_cluster(workers: int):
    """Worker processes of this machine: each with its own GPU, or with an equal share of the CPU's cores."""
    import torch
    from distributed import Nanny, Scheduler, SpecCluster

    n_gpus = torch.cuda.device_count()
    if 0 < n_gpus < workers:
        raise ClusterError(
            f"--workers {workers}: each worker needs a GPU of its own, and this machine has {n_gpus}. Use"
            f" --workers {n_gpus}, or CUDA_VISIBLE_DEVICES= before the command for the CPU alone."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(n_gpus)))).split(",")
    threads = max(1, (os.cpu_count() or 1) // workers)
    specs = {}
    for k in range(workers):
        own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if n_gpus:
            own["CUDA_VISIBLE_DEVICES"] = visible[k]
        specs[k] = {"cls": Nanny, "options": {"nthreads": 1, "memory_limit": 0, "env": own}}
    local = {"host": "127.0.0.1", "port": 0, "dashboard": False}
    return SpecCluster(workers=specs, scheduler={"cls": Scheduler, "options": local}, silence_logs=logging.CRITICAL)
