"""`./run_all.sh --on kaggle`: the suite as a private notebook on Kaggle's GPUs, and what it leaves brought back.

The notebook carries the whole suite in its first cell: nothing but it is uploaded, and the data set is attached.
Kaggle's client authenticates when imported and waits without a time limit, so every call is a child process with one.
A run goes on without this machine: `runs/NAME/pushed.json` says what was pushed, and the same command fetches it.
"""

import base64
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

from brats_helpers.data.sources import KAGGLE_SETS, credentials, kaggle_api
from brats_helpers.files import write_json
from brats_helpers.log import done, duration, fail, warn
from brats_helpers.runs import Run
from brats_helpers.suite.plan import Plan

CARRIED = (
    "run_all.sh",
    "setup_env.sh",
    "pyproject.toml",
    "requirements.txt",
    "brats_helpers/*.py",
    "brats_helpers/pages/*",
    "notebooks/*.ipynb",
    "profiles/*.yaml",
)
"""What of the checkout goes to Kaggle."""
_MOST_BYTES = 1 << 20  # of a notebook on Kaggle
_POLL_S = 20
_CALL_S = 120  # for one answer of Kaggle
_FETCH_S = 3600  # for the files of a run
_PATIENCE_S = 1800  # without an answer while the run goes on there


class KaggleError(Exception):
    """Kaggle did not do what was asked; the message says why and what to do."""


class NoAnswer(KaggleError):
    """The connection broke, or Kaggle is busy: the same may work later."""


def run_on_kaggle(plan: Plan) -> int:
    """Push `plan` to Kaggle unless that was done before, wait for it, fetch its files. Returns the exit code."""
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
    pushed = json.loads(record.read_text()) if record.exists() else {}
    if pushed.get("key") != key or pushed["fetched"]:
        metadata["id"] = f"{_call('whoami', seconds=_CALL_S)}/{metadata['id']}"
        if not _agreed(plan, metadata, files, len(text)):
            warn("nothing was uploaded")
            return 2
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "suite.ipynb").write_text(text)
            Path(folder, "kernel-metadata.json").write_text(json.dumps(metadata))
            answer = _call("push", folder, seconds=_CALL_S)
        if answer["error"]:
            raise KaggleError(f"Kaggle did not take the notebook: {answer['error']}")
        pushed = {"key": key, "kernel": metadata["id"], "url": answer["url"], "fetched": False}
        write_json(record, pushed)
        done(f"pushed: {pushed['url']}; it runs there without this machine")
    else:
        done(f"pushed before: {pushed['url']}")
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
    done(f"all of it {run.folder}")
    return 0


def _metadata(plan: Plan) -> dict:
    """kernel-metadata.json, but for the account in its id."""
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
    """A notebook that unpacks the suite, runs it, and fails where it fails. The same suite gives the same bytes."""
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
        warn("nobody is here to agree to that: --yes does")
        return False
    return input("upload? [y/N] ").strip().lower() in ("y", "yes")


def _wait(pushed: dict) -> tuple[str, str]:
    """Wait until the run has ended; its status and Kaggle's message."""
    start = answered = time.monotonic()
    shown, said = "", start
    while True:
        try:
            answer = _call("status", pushed["kernel"], seconds=_CALL_S)
            status, answered = answer["status"], time.monotonic()
        except NoAnswer as error:
            if time.monotonic() - answered > _PATIENCE_S:
                raise KaggleError(f"{error} The run goes on: {pushed['url']}. {_LATER}") from error
            status = "no answer, trying again"
        except KaggleError as error:
            raise KaggleError(f"{error} The run goes on: {pushed['url']}. {_LATER}") from error
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
            return status, answer["message"]
        time.sleep(_POLL_S)


_LATER = "The same command waits for it and fetches what it leaves."


def _fetch(run: Run, kernel: str) -> str:
    """Bring the run's files into its folder, and return its log; what has arrived is not fetched again."""
    arriving = run.folder / ".kaggle"
    for attempt in range(5):
        try:
            _call("output", kernel, str(arriving), seconds=_FETCH_S)
            break
        except NoAnswer as error:
            if attempt == 4:
                raise KaggleError(f"{error} What has arrived is kept. {_LATER}") from error
            print("Kaggle: the connection broke, fetching goes on", flush=True)
            time.sleep(_POLL_S)
    if (arriving / run.folder.name).is_dir():
        shutil.copytree(arriving / run.folder.name, run.folder, dirs_exist_ok=True)
    log = "\n".join(_words(path.read_text("utf-8")) for path in arriving.glob("*.log"))
    (run.folder / "kaggle.log").write_text(log, "utf-8")
    shutil.rmtree(arriving)
    return log


def _words(log: str) -> str:
    """Kaggle's log is JSON, one entry per piece of output."""
    try:
        return "".join(entry["data"] for entry in json.loads(log))
    except (ValueError, KeyError, TypeError):
        return log


def _call(what: str, *arguments: str, seconds: float):
    """Ask Kaggle's client, in a child process, and return its answer.

    Raises:
        NoAnswer: the connection broke, or nothing came in `seconds`.
        KaggleError: refused.
    """
    code = "import sys; from brats_helpers.kaggle_run import _child; _child(*sys.argv[1:])"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-c", code, str(answer), what, *arguments]
        try:
            subprocess.run(
                command,
                env=environ,
                timeout=seconds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            raise NoAnswer(f"no answer from Kaggle for {duration(seconds)}.") from None
        facts = json.loads(answer.read_text()) if answer.exists() else {"end": "without a word"}
    if "result" in facts:
        return facts["result"]
    status = facts.get("status")
    if status in (401, 403):
        raise KaggleError(
            f"Kaggle did not accept the credentials in {credentials() or 'this account'} ({status}). Make a new token"
            " at https://www.kaggle.com/settings and put it there."
        )
    if facts.get("end") == "cut" or status == 429 or (status or 0) >= 500:
        raise NoAnswer(f"no answer from Kaggle ({status or 'the connection broke'}).")
    raise KaggleError(f"Kaggle's client failed to {what} ({status or facts['end']}).")


def _child(answer: str, what: str, *arguments: str) -> None:
    """In the child process: write `result`, or `status` (HTTP), or `end` (cut, or the name of an exception)."""
    import requests

    try:
        facts = {"result": _ask(kaggle_api(), what, *arguments)}
    except requests.HTTPError as error:
        facts = {"status": error.response.status_code}
    except (requests.RequestException, TimeoutError, ConnectionError):
        facts = {"end": "cut"}
    except SystemExit:
        facts = {"status": 401}  # how the client ends when it can use none of the credentials
    except Exception as error:
        response = getattr(error.__context__, "response", None)  # the client words some refusals as ValueError
        facts = {"end": type(error).__name__} if response is None else {"status": response.status_code}
    write_json(Path(answer), facts)


def _ask(api, what: str, *arguments: str):
    if what == "whoami":
        return api.config_values["username"]
    if what == "push":
        answer = api.kernels_push(*arguments)
        refused = answer.invalid_dataset_sources or []
        error = answer.error or (f"it has no data set {', '.join(refused)}" if refused else "")
        return {"error": error, "url": answer.url}
    if what == "status":
        answer = api.kernels_status(*arguments)
        return {"status": answer.status.name, "message": answer.failure_message}
    return api.kernels_output(*arguments)[0]
