"""The verb `run`: what `run_all.sh` does once everything is installed.

Everything before the first notebook needs only the standard library, so that a wrong argument stops the run before
anything is installed or written.
"""

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from brats_helpers.files import alive, processes, read_json, write_json
from brats_helpers.log import done, duration, fail, timing, warn
from brats_helpers.runs import Run
from brats_helpers.suite.environment import ROOT
from brats_helpers.suite.parameters import UsageError
from brats_helpers.suite.plan import RESERVED_SHARE, Plan, help_text, make_plan
from brats_helpers.suite.stages import (
    begin,
    compare_data,
    is_finished,
    papermill,
    reason,
    run_stage,
    warn_of_changes,
)


def main(argv: list[str], root: Path = ROOT) -> int:
    """Run the notebooks that `argv` names; return the exit code."""
    try:
        if {"-h", "--help"} & set(argv):
            print(help_text(root))
            return 0
        plan = make_plan(argv, root)
    except UsageError as error:
        fail(f"{error}\n   ./run_all.sh --help lists options, profiles and parameters; nothing ran.")
        return 2
    if "--check" in argv:
        return 0
    for stop in (signal.SIGTERM, signal.SIGINT):  # in the background of a script, the second is ignored
        signal.signal(stop, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        if plan.log:
            log = stack.enter_context(open(plan.log, "a", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(_Both(sys.stdout, log)))
        try:
            if plan.on_kaggle:
                from brats_helpers.suite.kaggle import run_on_kaggle

                return run_on_kaggle(plan)
            return _prepare(plan) if plan.prepare_only else _run(plan)
        except KeyboardInterrupt:
            warn(f"stopped; this continues: {plan.command}")
            return 130


class _Both(io.TextIOBase):
    """A text file that writes to two others."""

    def __init__(self, *files: TextIO):
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            file.write(text)
            file.flush()
        return len(text)


def _prepare(plan: Plan) -> int:
    run = Run(plan.folder)
    for stage in plan.stages:
        papermill(plan, stage, run.notebooks / f"{stage}.ipynb", prepare_only=True)
    done(f"{len(plan.stages)} notebooks with their parameters, none of them run: {run.notebooks}")
    return 0


def _run(plan: Plan) -> int:
    start = time.monotonic()
    run = Run(plan.folder)
    with _alone_in(run) as other:
        if other:
            fail(f"process {other} is running in {run.folder}: wait for it, stop it, or choose another --run")
            return 1
        print(f"run {run.name}, profile {plan.profile}: {', '.join(plan.stages)}", flush=True)
        unreachable = compare_data(run) if "00_setup" in plan.stages else ""
        if unreachable and not _is_complete(plan, run):
            fail(f"{unreachable}\n   All results in {run.folder} stay as they are.")
            return 1
        if unreachable:
            warn(f"{unreachable}\n   Every notebook has finished, so the results stay as they are.")
        elif not (_finish(plan, run, start) and _report(run)):
            return 1
    done(f"report    {run.report}")
    done(f"figures   {run.figures}")
    done(f"notebooks {run.notebooks}")
    timing(f"run {run.name}", time.monotonic() - start)
    return 0


@contextlib.contextmanager
def _alone_in(run: Run) -> Iterator[int | None]:
    """Mark the run's folder as in use. Yield the process of this machine that already uses it, or None."""
    note = run.folder / "running.json"
    holder = read_json(note, {})
    if holder.get("among") == processes() and holder["process"] != os.getpid() and alive(holder["process"]):
        yield holder["process"]
        return
    write_json(note, {"process": os.getpid(), "among": processes()})
    try:
        yield None
    finally:
        note.unlink(missing_ok=True)


def _is_complete(plan: Plan, run: Run) -> bool:
    if plan.has_members:
        from brats_helpers.suite.folds import is_complete

        return is_complete(plan, run)
    return is_finished(plan, run, plan.stages)


def _finish(plan: Plan, run: Run, start: float) -> bool:
    if plan.has_members:
        from brats_helpers.suite.folds import run_members

        return run_members(plan, run)
    begin(plan, run)
    warn_of_changes(plan, run)
    return _run_in_time(plan, run, start)


def _report(run: Run) -> bool:
    from brats_helpers.report.build import fresh_report

    try:
        fresh_report(run)
    except Exception as error:
        fail(f"the report failed: {reason(error)}")
        return False
    return True


def _run_in_time(plan: Plan, run: Run, start: float) -> bool:
    """Run the plan's notebooks within its time limit; return whether there are scores.

    The limit counts from `start`, in seconds of `time.monotonic`.
    """
    if plan.time_limit:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 60 * plan.time_limit)
    try:
        for stage in plan.stages:
            if stage == "02_train" and plan.time_limit:
                plan = with_time_left(plan, time.monotonic() - start)
            if not run_stage(plan, run, stage):
                return False
    except KeyboardInterrupt:
        if not plan.time_limit or time.monotonic() - start < 60 * plan.time_limit:
            raise
        limit = f"the time limit of {plan.time_limit:g} minutes was reached in {stage}"
        if "03_evaluate" in plan.stages and not is_finished(plan, run, ["03_evaluate"]):
            fail(f"{limit}; this continues: {plan.command}")
            return False
        warn(f"{limit}; the report shows what is finished")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return True


def with_time_left(plan: Plan, elapsed_s: float) -> Plan:
    """Return the plan with the training time of notebook 02 cut to what the set-up has left."""
    left = max(plan.time_limit * (1 - RESERVED_SHARE) - elapsed_s / 60, 0.1)
    planned = plan.given["02_train"]["minutes"]
    if left >= planned:
        return plan
    warn(f"training gets {left:.1f} minutes, not {planned:g}: the set-up took {duration(elapsed_s)}")
    return plan.with_values({"minutes": left}, stages=["02_train"])
