"""`./run_all.sh --on kaggle`: run the suite as a private notebook on Kaggle's GPUs and fetch the results.

The notebook contains the whole suite in its first cell. Nothing else is uploaded; the data set is attached. A run does
not need this machine: `runs/NAME/pushed.json` records what was pushed, and the same command fetches its results.
"""

import base64
import hashlib
import io
import json
import re
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brats_helpers.data.kaggle import broke_off, credentials, kaggle_api, status_of, tamed
from brats_helpers.data.sources import KAGGLE_SETS
from brats_helpers.files import write_json
from brats_helpers.log import done, duration, fail, warn
from brats_helpers.runs import Run
from brats_helpers.suite.plan import Plan

CARRIED = (
    "run_all.sh",
    "setup_env.sh",
    "pyproject.toml",
    "requirements.txt",
    "brats_helpers/**/*.py",
    "brats_helpers/report/pages/*",
    "notebooks/*.ipynb",
    "profiles/*.yaml",
)
"""The files of the checkout that are pushed to Kaggle."""
_MOST_BYTES = 1 << 20  # of a notebook on Kaggle
_POLL_S = 20
_PATIENCE_S = 1800  # of waiting without an answer
_LATER = "The same command waits for it and fetches its results."


class KaggleError(Exception):
    """Kaggle refused; the message says why and what to do."""


class NoAnswer(KaggleError):
    """The connection broke, or Kaggle is busy: trying again later may work."""


def run_on_kaggle(plan: Plan) -> int:
    """Push `plan` to Kaggle unless an earlier call did, wait for the run, and fetch its files. Return the exit code."""
    try:
        return _run(plan)
    except KaggleError as error:
        fail(str(error))
        return 1


def _run(plan: Plan) -> int:
    if not credentials():
        raise KaggleError(
            "--on kaggle needs an account: make a token at https://www.kaggle.com/settings and set KAGGLE_API_TOKEN to"
            " it, or save it as ~/.kaggle/access_token. Nothing was uploaded."
        )
    metadata, files = _metadata(plan), _carried(plan.root)
    text = json.dumps(_notebook(plan, files))
    if len(text) > _MOST_BYTES:
        raise KaggleError(f"the suite makes a notebook of {len(text):,} bytes; Kaggle takes {_MOST_BYTES:,}.")
    key = hashlib.sha256((text + json.dumps(metadata)).encode()).hexdigest()[:16]
    record = plan.folder / "pushed.json"
    pushed = json.loads(record.read_text("utf-8")) if record.exists() else {}
    if pushed.get("key") == key and not pushed["fetched"]:
        done(f"pushed before: {pushed['url']}")
    else:
        with _asking("whoami") as api:
            metadata["id"] = f"{api.config_values['username']}/{metadata['id']}"
        if not _agreed(plan, metadata, files, len(text)):
            warn("nothing was uploaded")
            return 2
        pushed = {"key": key, "kernel": metadata["id"], "url": _push(metadata, text), "fetched": False}
        write_json(record, pushed)
        done(f"pushed: {pushed['url']}; it runs there without this machine")
    run = Run(plan.folder)
    status, message = _wait(pushed)
    log = _fetch(run, pushed["kernel"])
    write_json(record, pushed | {"fetched": True})
    if status != "COMPLETE":
        last = next((line for line in reversed(log.splitlines()) if line.startswith("❌")), message or "see the log")
        fail(f"the run ended on Kaggle as {status}: {last}\n   Its log and what it left: {run.folder}")
        return 1
    if not run.report.exists():
        raise KaggleError(f"the run ended on Kaggle as {status}, but left no report; see {run.folder / 'kaggle.log'}.")
    done(f"report    {run.report}")
    done(f"all files {run.folder}")
    return 0


def _push(metadata: dict, text: str) -> str:
    """Upload the notebook, which starts it, and return its address."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "suite.ipynb").write_text(text, "utf-8")
        Path(folder, "kernel-metadata.json").write_text(json.dumps(metadata), "utf-8")
        with _asking("push") as api:
            answer = api.kernels_push(folder)
    refused = ", ".join(answer.invalid_dataset_sources or [])
    if answer.error or refused:
        raise KaggleError(f"Kaggle did not accept the notebook: {answer.error or f'it has no data set {refused}'}")
    return answer.url


def _metadata(plan: Plan) -> dict:
    """The content of kernel-metadata.json, with an `id` that lacks the account."""
    data = plan.values["00_setup"]["data"]
    title = f"brats {plan.folder.name}"
    short = next(iter(KAGGLE_SETS)) if data == "kaggle" else data
    return {
        "id": re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"),
        "title": title,
        "code_file": "suite.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "machine_shape": "NvidiaTeslaT4",
        "enable_internet": True,
        "dataset_sources": [KAGGLE_SETS[short].handle] if short in KAGGLE_SETS else [],
    }


def _carried(root: Path) -> list[Path]:
    return [path for pattern in CARRIED for path in sorted(root.glob(pattern))]


def _notebook(plan: Plan, files: list[Path]) -> dict:
    """Build a notebook that unpacks and runs the suite, and fails if it fails. The same suite gives the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for path in files:
            member = tarfile.TarInfo(path.relative_to(plan.root).as_posix())
            member.size, member.mode = path.stat().st_size, 0o755
            tar.addfile(member, io.BytesIO(path.read_bytes()))
    packed = base64.b64encode(buffer.getvalue()).decode()
    run = ["--run", f"/kaggle/working/{plan.folder.name}"]
    command = shlex.join(["bash", "/tmp/suite/run_all.sh", *run, *plan.on_kaggle])
    sources = [
        "import base64, io, tarfile\n\n"
        f'suite = io.BytesIO(base64.b64decode("{packed}"))\ntarfile.open(fileobj=suite).extractall("/tmp/suite")',
        f'!{command}\nassert _exit_code == 0, f"exit code {{_exit_code}}"',
    ]
    cells = [
        {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source}
        for source in sources
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def _agreed(plan: Plan, metadata: dict, files: list[Path], size: int) -> bool:
    """Show what would be uploaded, and ask, unless the command line agreed to it."""
    print(f"to Kaggle, as the private notebook {metadata['id']}, {size / 1e3:.0f} kB, with internet and GPU:")
    folders = Counter(path.relative_to(plan.root).parent.as_posix() + "/" for path in files)
    print(f"  {len(files)} files: {', '.join(path.name for path in files if path.parent == plan.root)}")
    print(f"  and all of {', '.join(f'{folder} ({n})' for folder, n in folders.items() if folder != './')}")
    print(f"  attached: {', '.join(metadata['dataset_sources']) or 'no data set'}")
    print(f"  it runs: ./run_all.sh {shlex.join(plan.on_kaggle)}", flush=True)
    if plan.agreed:
        return True
    if not sys.stdin.isatty():
        warn("there is no terminal to ask on: agree with --yes")
        return False
    return input("upload? [y/N] ").strip().lower() in ("y", "yes")


def _wait(pushed: dict) -> tuple[str, str]:
    """Wait until the run has ended; return its status and Kaggle's message."""
    start = answered = time.monotonic()
    shown, said = "", start
    while True:
        try:
            with _asking("status") as api:
                answer = api.kernels_status(pushed["kernel"])
            status, answered = answer.status.name, time.monotonic()
        except NoAnswer as error:
            if time.monotonic() - answered > _PATIENCE_S:
                raise KaggleError(f"{error} The run continues: {pushed['url']}. {_LATER}") from error
            status = "no answer, trying again"
        except KaggleError as error:
            raise KaggleError(f"{error} The run continues: {pushed['url']}. {_LATER}") from error
        now = time.monotonic()
        line = f"Kaggle: {status.lower().replace('_', ' ')}"
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line}, {duration(now - start)}", end="", flush=True)
        elif status != shown or now - said > 600:
            print(f"{line}, {duration(now - start)}", flush=True)
            said = now
        shown = status
        if status in ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED"):
            print(end="\n" if sys.stdout.isatty() else "", flush=True)
            return status, answer.failure_message
        time.sleep(_POLL_S)


def _fetch(run: Run, kernel: str) -> str:
    """Fetch the run's files into its folder, and return its log. Files that have arrived are not fetched again."""
    arriving = run.folder / ".kaggle"
    for attempt in range(5):
        try:
            with _asking("output") as api:
                api.kernels_output(kernel, str(arriving))
            break
        except NoAnswer as error:
            if attempt == 4:
                raise KaggleError(f"{error} What has arrived is kept. {_LATER}") from error
            print("Kaggle: the connection broke, trying again", flush=True)
            time.sleep(_POLL_S)
    if (arriving / run.folder.name).is_dir():
        shutil.copytree(arriving / run.folder.name, run.folder, dirs_exist_ok=True)
    log = "\n".join(_words(path.read_text("utf-8")) for path in arriving.glob("*.log"))
    (run.folder / "kaggle.log").write_text(log, "utf-8")
    shutil.rmtree(arriving)
    return log


def _words(log: str) -> str:
    """Return the text of Kaggle's log, which is JSON with one entry per piece of output."""
    try:
        return "".join(entry["data"] for entry in json.loads(log))
    except (ValueError, KeyError, TypeError):
        return log


@contextmanager
def _asking(what: str) -> Iterator:
    """Kaggle's client for one request, named `what` in messages.

    Raises:
        NoAnswer: the connection broke, or Kaggle is busy.
        KaggleError: refused, or the client failed.
    """
    try:
        with tamed():
            yield kaggle_api()
    except ImportError:
        raise KaggleError("--on kaggle needs the package kaggle: pip install kaggle") from None
    except (Exception, SystemExit) as error:
        status = status_of(error)
        if status in (401, 403):
            raise KaggleError(
                f"Kaggle did not accept the credentials in {credentials() or 'this account'} ({status}). Make a new"
                " token at https://www.kaggle.com/settings and put it there."
            ) from None
        if broke_off(error):
            raise NoAnswer(f"no answer from Kaggle ({status or 'the connection broke'}).") from None
        raise KaggleError(f"Kaggle's client failed to {what} ({status or type(error).__name__}).") from None
