"""Execute notebooks: finished ones are kept, unfinished and outdated ones run; the manifest records it."""

import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from brats_helpers.files import read_json
from brats_helpers.log import done, duration, fail, timing, warn
from brats_helpers.runs import NEEDS, Run
from brats_helpers.suite.environment import installed, required
from brats_helpers.suite.plan import Plan

FINISHED, RUNNING, FAILED, STOPPED = "finished", "running", "failed", "stopped"
OUTDATED = "outdated"
"""Status of a stage in the manifest. Outdated: it finished, but something that it depends on has changed since."""


def begin(plan: Plan, run: Run, **entries) -> None:
    """Record the start of the command in a run's manifest."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    run.record(profile=plan.profile, started=started, **_provenance(plan), **entries)


def is_finished(plan: Plan, run: Run, stages: Iterable[str]) -> bool:
    """Whether all these notebooks have finished in `run` with the parameters of the plan."""
    made = run.manifest.get("stages", {})
    entries = [(made.get(stage, {}), plan.keys[stage]) for stage in stages]
    return all(entry.get("status") == FINISHED and entry["key"] == key for entry, key in entries)


def mark_outdated(run: Run, stages: Iterable[str]) -> None:
    """Mark the results of `stages` as outdated; they are kept until the new ones are complete."""
    made = run.manifest.get("stages", {})
    outdated = {stage: made[stage] | {"status": OUTDATED} for stage in stages if stage in made}
    if outdated:
        run.record(stages=made | outdated)


def before(stages: Iterable[str]) -> set[str]:
    """Return every stage that one of `stages` depends on."""
    needs = {need for stage in stages for need in NEEDS[stage]}
    return needs | before(needs) if needs else needs


def run_stages(plan: Plan, run: Run, stages: Sequence[str]) -> bool:
    """Run notebooks in order until one fails; return whether all are finished."""
    return all(run_stage(plan, run, stage) for stage in stages)


def compare_data(run: Run) -> str:
    """Compare the patients on disk with those that 00_setup split, and return why they cannot be reached, or "".

    Only patients that could be read and differ make 00_setup outdated.
    """
    entry = run.manifest.get("stages", {}).get("00_setup", {})
    if entry.get("status") != FINISHED or not run.splits.exists():
        return ""
    digest = _splits_digest(run)
    if entry.get("splits_digest", digest) != digest:
        warn(f"{run.splits} has changed since 00_setup wrote it: the notebook was run by hand")
        mark_outdated(run, ["00_setup"])
        return ""
    from brats_helpers.data.patients import ChangedError, load_parts
    from brats_helpers.labels import DataError

    try:
        load_parts(run)
    except ChangedError as error:
        warn(str(error))
        mark_outdated(run, ["00_setup"])
    except (DataError, OSError) as error:
        return str(error)
    return ""


def run_stage(plan: Plan, run: Run, stage: str) -> bool:
    """Run one notebook unless it is finished; return whether it is finished now.

    Its earlier results are replaced file by file; the others are removed once it has finished. The notebooks that
    depend on it become outdated.
    """
    made = run.manifest.get("stages", {})
    how = _provenance(plan)
    if is_finished(plan, run, [stage]):
        then = made[stage].get("revision")
        other = f", by revision {then} of the suite, not {how['revision']}" if then != how["revision"] else ""
        done(f"{stage}: finished before, in {duration(made[stage]['seconds'])}{other}")
        return True
    mark_outdated(run, [other for other in NEEDS if stage in before([other])])
    earlier = run.results_of(stage)
    entry = {"parameters": plan.values[stage], "key": plan.keys[stage], "status": RUNNING} | how
    _record(run, stage, entry)
    print(f"{stage}: started {datetime.now():%H:%M}", flush=True)
    start = time.monotonic()
    status = STOPPED
    try:
        _execute(plan, run, stage)
        run.forget(stage, written=earlier)
        status = FINISHED
        if stage == "00_setup":
            entry["splits_digest"] = _splits_digest(run)
    except Exception as error:
        status = FAILED
        fail(_what_failed(stage, run, error))
    finally:
        seconds = time.monotonic() - start
        _record(run, stage, entry | {"status": status, "seconds": round(seconds, 1)})
    if status == FINISHED:
        timing(stage, seconds)
    return status == FINISHED


def _record(run: Run, stage: str, entry: dict) -> None:
    run.record(stages=run.manifest.get("stages", {}) | {stage: entry})


def _splits_digest(run: Run) -> str | None:
    """A digest of which patient is in which part."""
    return hashlib.sha256(run.splits.read_bytes()).hexdigest()[:16] if run.splits.exists() else None


def _execute(plan: Plan, run: Run, stage: str) -> None:
    """Execute a notebook in `notebooks/unfinished/`; only a finished one replaces the executed notebook."""
    path, unfinished = run.notebooks / f"{stage}.ipynb", _unfinished(run, stage)
    try:
        papermill(plan, stage, unfinished)
    except BaseException:
        if unfinished.exists() and not path.exists():
            os.replace(unfinished, path)
        raise
    os.replace(unfinished, path)
    with suppress(OSError):  # another failed notebook is still there
        unfinished.parent.rmdir()


def _unfinished(run: Run, stage: str) -> Path:
    return run.notebooks / "unfinished" / f"{stage}.ipynb"


def papermill(plan: Plan, stage: str, output: Path, *, prepare_only: bool = False) -> None:
    """Write the notebook `stage` with the plan's parameters to `output`, executed unless `prepare_only`."""
    import papermill
    from jupyter_client import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        """A kernel of the Python that runs the suite, whatever is registered as python3."""

        shutdown_wait_time = 2.0  # s, before a busy kernel is killed

        def format_kernel_cmd(self, extra_arguments=None):
            launch = [sys.executable, "-m", "ipykernel_launcher", "--log-level=CRITICAL", "-f", self.connection_file]
            return launch + (extra_arguments or [])

    output.parent.mkdir(parents=True, exist_ok=True)
    for tries_left in (2, 1, 0):
        try:
            papermill.execute_notebook(
                plan.root / "notebooks" / f"{stage}.ipynb",
                output,
                parameters=plan.given[stage],
                prepare_only=prepare_only,
                kernel_name="python3",
                language="python",
                cwd=plan.root,
                progress_bar=False,
                stdout_file=sys.stdout,
                kernel_manager_class=ThisPython,
            )
            return
        except RuntimeError as error:  # the kernel's ports are chosen before it starts: another process may take one
            if not tries_left or "Kernel died before replying" not in str(error):
                raise
            warn(f"{stage}: its kernel did not start; trying again")


def _what_failed(stage: str, run: Run, error: Exception) -> str:
    """One paragraph: notebook, cell, error message, and the path of the partly executed notebook."""
    # nbclient reports an error in a cell, a kernel that died and a kernel that never started in different ways. The
    # notebook as written so far shows the cell in each case.
    path = _unfinished(run, stage)
    if not path.exists():
        path = run.notebooks / f"{stage}.ipynb"
    heading, number, at = "", 0, "before its first cell"
    for entry in read_json(path, {"cells": []})["cells"]:
        source = "".join(entry["source"])
        if entry["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ *(.+)", source, re.MULTILINE) or [heading])[-1]
            continue
        number += 1
        if entry["metadata"].get("papermill", {}).get("start_time"):
            at = f"in code cell {number}, under {heading!r}: {source.strip().partition(chr(10))[0]}"
    return f"{stage} failed {at}\n   {reason(error)}\n   The notebook up to there: {path}"


def reason(error: Exception) -> str:
    """Return the error's name and message, with long lines and the middle of a long message shortened."""
    name, message = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", error)
    lines = re.sub(r"\x1b\[[\d;]*m", "", f"{name}: {message}").splitlines()
    cut = [*lines[:8], "[...]", *lines[-12:]] if len(lines) > 20 else lines
    return "\n   ".join(line if len(line) <= 500 else f"{line[:500]} [...]" for line in cut)


def warn_of_changes(plan: Plan, run: Run) -> None:
    """Warn if an earlier notebook, left out by `--only`, ran with other parameters than the command's."""
    for stage in sorted(before(plan.stages) - set(plan.stages)):
        recorded = run.manifest["stages"][stage]["parameters"]
        for name, value in plan.values[stage].items():
            if recorded.get(name) != value and name != "run_dir":
                warn(f"{stage} ran with {name}={recorded.get(name)}, not {value}; --only leaves it as it is")


def _provenance(plan: Plan) -> dict:
    """What determines the results besides the parameters."""
    return {"command": plan.command, "revision": revision(plan.root), "versions": _versions(plan.root)}


def _versions(root: Path) -> dict[str, str | None]:
    from packaging.requirements import Requirement

    names = [Requirement(line).name for line in required(root)]
    return {"python": platform.python_version()} | {name: installed(name) for name in names}


def revision(root: Path) -> str | None:
    """Return the commit, with `-dirty` where files differ from it; None outside a repository."""
    git = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(describe, capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
