"""The headless run: profiles and parameters, the notebooks in order, picking up, the manifest.

Everything before the first notebook needs the standard library alone, so that a wrong argument stops the run before
anything is installed or written.
"""

import contextlib
import hashlib
import io
import json
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from brats_helpers.log import done, duration, fail, timing, warn
from brats_helpers.runs import NEEDS, Run
from brats_helpers.suite.environment import ROOT, installed, name_of, required
from brats_helpers.suite.plan import RESERVED_SHARE, Plan, UsageError, help_text, make_plan


def main(argv: list[str], root: Path = ROOT) -> int:
    """The verb `run`: what `run_all.sh` does once everything is installed. Returns the exit code."""
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
    for stop in (signal.SIGTERM, signal.SIGINT):  # a script's background ignores the second
        signal.signal(stop, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        if plan.log:
            log = stack.enter_context(open(plan.log, "a", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(_Both(sys.stdout, log)))
        try:
            if plan.on_kaggle:
                from brats_helpers.suite.kaggle import run_on_kaggle

                return run_on_kaggle(plan)
            if plan.prepare_only:
                return _prepare(plan)
            return _start_workers(plan, argv) if plan.workers else _run(plan)
        except KeyboardInterrupt:
            warn(f"stopped; this picks up: {plan.command}")
            return 130


class _Both(io.TextIOBase):
    """What is written to it goes to both files."""

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
        _papermill(plan, stage, run.notebooks, prepare_only=True)
    done(f"{len(plan.stages)} notebooks with their parameters, none of them run: {run.notebooks}")
    return 0


def _start_workers(plan: Plan, argv: list[str]) -> int:
    from brats_helpers.suite.workers import start

    try:
        return start(_work, argv, workers=plan.workers, folder=plan.folder / "workers", job=plan.job)
    except ImportError:
        fail("--workers needs submitit: pip install submitit. Or start the same command several times without it.")
        return 1
    except OSError as error:
        fail(str(error))
        return 1


def _work(argv: list[str]) -> int:
    return _run(make_plan(argv))


def _run(plan: Plan) -> int:
    start = time.monotonic()
    run = Run(plan.folder)
    print(f"run {run.name}, profile {plan.profile}: {', '.join(plan.stages)}", flush=True)
    if plan.folds or any(plan.sweep):
        from brats_helpers.suite.folds import share_out

        finished = share_out(plan, run, begin=_begin, run_stages=_run_stages)
    else:
        _begin(plan, run)
        for need in sorted(_before(plan.stages) - set(plan.stages)):
            _warn_of_change(run, need, plan.values[need])
        finished = _run_in_time(plan, run, start)
    if not (finished and _report(run)):
        return 1
    done(f"report    {run.report}")
    done(f"figures   {run.figures}")
    done(f"notebooks {run.notebooks}")
    timing(f"run {run.name}", time.monotonic() - start)
    return 0


def _begin(plan: Plan, run: Run, **entries) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    run.record(profile=plan.profile, started=started, **_provenance(plan), **entries)


def _report(run: Run) -> bool:
    from brats_helpers.report.build import fresh_report
    from brats_helpers.suite.workers import awaited

    try:
        with awaited(run.folder / "claims", "report") if run.manifest.get("shared") else contextlib.nullcontext():
            fresh_report(run)
    except Exception as error:
        fail(f"the report failed: {_reason(error)}")
        return False
    return True


def _run_in_time(plan: Plan, run: Run, start: float) -> bool:
    """Run the notebooks of the plan, under its time limit, which counts from `start`; whether there are scores."""
    if plan.time_limit:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 60 * plan.time_limit)
    try:
        for stage in plan.stages:
            if stage == "02_train" and plan.time_limit:
                _fit_training(plan, time.monotonic() - start)
            if not _run_stage(plan, run, stage):
                return False
    except KeyboardInterrupt:
        if not plan.time_limit or time.monotonic() - start < 60 * plan.time_limit:
            raise
        if "03_evaluate" in plan.stages and run.manifest["stages"].get("03_evaluate", {}).get("status") != "finished":
            fail(f"the time limit, {plan.time_limit:g} minutes, came in {stage}; this picks up: {plan.command}")
            return False
        warn(f"the time limit, {plan.time_limit:g} minutes, came in {stage}; the report shows what is there")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return True


def _run_stages(plan: Plan, run: Run, stages: Iterable[str]) -> bool:
    """Run notebooks in order as far as they succeed; whether all did."""
    return all(_run_stage(plan, run, stage) for stage in stages)


def _fit_training(plan: Plan, elapsed_s: float) -> None:
    """Cut the minutes of notebook 02 to what the set-up has left of the time limit."""
    left = plan.time_limit * (1 - RESERVED_SHARE) - elapsed_s / 60
    planned = plan.given["02_train"]["minutes"]
    if left < planned:
        warn(f"training gets {max(left, 0.1):.1f} minutes, not {planned:g}: the set-up took {duration(elapsed_s)}")
        for kind in (plan.values, plan.given):
            kind["02_train"]["minutes"] = max(left, 0.1)


def _run_stage(plan: Plan, run: Run, stage: str) -> bool:
    """Run one notebook unless it is finished; whether it is finished now."""
    made = run.manifest.get("stages", {})
    key = plan.keys[stage]
    finished = made.get(stage, {}).get("status") == "finished" and made[stage]["key"] == key
    how = _provenance(plan)
    if finished and not _data_changed(run, stage):
        then = made[stage].get("revision", "that nobody noted")
        other = f", by the suite's revision {then}, not {how['revision']}" if then != how["revision"] else ""
        done(f"{stage}: finished before, in {duration(made[stage]['seconds'])}{other}")
        return True
    # Whatever was made from this notebook's last files is out of date from here on.
    for other in [other for other in NEEDS if other == stage or stage in _before([other])]:
        made.pop(other, None)
        run.forget(other)
    entry = {"parameters": plan.values[stage], "key": key, "status": "running"} | how
    run.record(stages=made | {stage: entry})
    print(f"{stage}: started {datetime.now():%H:%M}", flush=True)
    start = time.monotonic()
    status = "stopped"
    try:
        _papermill(plan, stage, run.notebooks)
        status = "finished"
        if stage == "00_setup":
            entry["splits_digest"] = _splits_digest(run)
    except Exception as error:
        status = "failed"
        fail(_what_failed(stage, run.notebooks / f"{stage}.ipynb", error))
    finally:
        seconds = time.monotonic() - start
        run.record(stages=made | {stage: entry | {"status": status, "seconds": round(seconds, 1)}})
    if status == "finished":
        timing(stage, seconds)
    return status == "finished"


def _splits_digest(run: Run) -> str | None:
    """A digest of who is in which part."""
    return hashlib.sha256(run.splits.read_bytes()).hexdigest()[:16] if run.splits.exists() else None


def _data_changed(run: Run, stage: str) -> bool:
    """Whether the patients that 00_setup shared out here are no longer those on disk, or shared out otherwise."""
    if stage != "00_setup" or not run.splits.exists():
        return False
    digest = _splits_digest(run)
    if run.manifest["stages"][stage].get("splits_digest", digest) != digest:
        warn(f"{run.splits} is not what {stage} left in this run: the notebook was run by hand as well")
        return True
    from brats_helpers.data.patients import load_parts
    from brats_helpers.labels import DataError

    try:
        load_parts(run)
    except DataError as error:
        warn(str(error))
        return True
    return False


def _papermill(plan: Plan, stage: str, into: Path, prepare_only: bool = False) -> None:
    import papermill
    from jupyter_client import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        """The kernel of the Python that runs the suite, whatever kernel is registered as python3."""

        shutdown_wait_time = 2.0  # s, before a busy kernel is killed

        def format_kernel_cmd(self, extra_arguments=None):
            launch = [sys.executable, "-m", "ipykernel_launcher", "--log-level=CRITICAL", "-f", self.connection_file]
            return launch + (extra_arguments or [])

    into.mkdir(parents=True, exist_ok=True)
    for tries_left in (2, 1, 0):
        try:
            return papermill.execute_notebook(
                plan.root / "notebooks" / f"{stage}.ipynb",
                into / f"{stage}.ipynb",
                parameters=plan.given[stage],
                prepare_only=prepare_only,
                kernel_name="python3",
                language="python",
                cwd=plan.root,
                progress_bar=False,
                stdout_file=sys.stdout,
                kernel_manager_class=ThisPython,
            )
        except RuntimeError as error:  # the kernel's ports are chosen before it starts: another process may take one
            if not tries_left or "Kernel died before replying" not in str(error):
                raise
            warn(f"{stage}: its kernel did not come up; once more")


def _what_failed(stage: str, path: Path, error: Exception) -> str:
    """One paragraph: notebook, cell, the error's message, and where the notebook written so far lies."""
    # nbclient tells of an error in a cell, of a kernel that died, of a kernel that never came up, in different ways;
    # the notebook written so far knows the cell in all of them.
    heading, number, at = "", 0, "before its first cell"
    for entry in json.loads(path.read_text("utf-8"))["cells"] if path.exists() else ():
        source = "".join(entry["source"])
        if entry["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ *(.+)", source, re.MULTILINE) or [heading])[-1]
            continue
        number += 1
        if entry["metadata"].get("papermill", {}).get("start_time"):
            at = f"in code cell {number}, under {heading!r}: {source.strip().partition(chr(10))[0]}"
    return f"{stage} failed {at}\n   {_reason(error)}\n   The notebook as far as it came: {path}"


def _reason(error: Exception) -> str:
    """Its name and message, whose lines say what to do and are kept; cut in the middle, and where they are too long."""
    name, message = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
    lines = re.sub(r"\x1b\[[\d;]*m", "", f"{name}: {message}").splitlines()
    cut = [*lines[:8], "[...]", *lines[-12:]] if len(lines) > 20 else lines
    return "\n   ".join(line if len(line) <= 500 else f"{line[:500]} [...]" for line in cut)


def _before(stages: Iterable[str]) -> set[str]:
    """Every stage that one of `stages` builds on."""
    needs = {need for stage in stages for need in NEEDS[stage]}
    return needs | _before(needs) if needs else needs


def _warn_of_change(run: Run, stage: str, values: dict) -> None:
    recorded = run.manifest["stages"][stage]["parameters"]
    for name in values:
        if recorded.get(name) != values[name] and name != "run_dir":
            warn(f"{stage} ran with {name}={recorded.get(name)}, not {values[name]}; --only leaves it as it is")


def _provenance(plan: Plan) -> dict:
    """What made a notebook's files, besides its parameters."""
    return {"command": plan.command, "revision": _revision(plan.root), "versions": _versions(plan.root)}


def _versions(root: Path) -> dict[str, str | None]:
    names = [name_of(line) for line in required(root)]
    return {"python": platform.python_version()} | {name: installed(name) for name in names}


def _revision(root: Path) -> str | None:
    """The commit, with `-dirty` where files differ from it; None outside a repository."""
    git = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    try:
        answer = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
