"""A run survives SIGKILL at any moment of notebook 03 and of the report: the same command completes it.

`BRATS_KILLS=20` kills as often; a normal test run does so a few times.
"""

import contextlib
import json
import os
import random
import time
import zipfile

import nbformat
import nibabel as nib
import numpy as np
import pandas as pd
import psutil
import torch
from PIL import Image

from brats_helpers.files import PART, read_json
from tests.suite.checkout import HERE, start
from tests.tiny_run import PARTS, write_tiny_run

KILLS = int(os.environ.get("BRATS_KILLS", "2"))
MOMENTS_S = (4, 30)  # from the first import to the end of the report, on two slow cores


def kill_tree(process):
    """Kill a process and all below it, as a machine that goes down does."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def read_whole(path):
    """Read a file to its end as what its name says; any tear is an error."""
    name = path.name
    if name.endswith((".json", ".ipynb")):
        return nbformat.read(path, 4) if name.endswith(".ipynb") else json.loads(path.read_text("utf-8"))
    if name.endswith(".csv"):
        return pd.read_csv(path)
    if name.endswith((".png", ".gif")):
        return Image.open(path).load()
    if name.endswith(".nii.gz"):
        return np.asarray(nib.load(path).dataobj)
    if name.endswith(".zip"):
        return zipfile.ZipFile(path).testzip() is None or 1 / 0
    if name.endswith(".pt"):
        return torch.load(path, weights_only=True)
    if name.endswith(".html") and path.parent.name == "report":
        assert path.read_text("utf-8").rstrip().endswith("</html>"), path
    return None


def test_the_same_command_completes_a_run_after_kills_at_random_moments(tmp_path):
    run = write_tiny_run(tmp_path)
    stages = {stage: entry | {"key": stage} for stage, entry in run.manifest["stages"].items()}
    run.record(
        stages={stage: stages[stage] for stage in ("00_setup", "01_explore", "02_train")}, device={"device": "CPU"}
    )
    draw = random.Random(KILLS)
    command = ["--profile", "smoke", "--run", str(run.folder), "--only", "03", "-p", "device", "cpu"]
    for k in range(KILLS):
        process = start(HERE, *command, "-p", "flips", str(bool(k % 2)))  # changed, so that there is work to do
        time.sleep(draw.uniform(*MOMENTS_S))
        kill_tree(process)
        process.communicate()
    process = start(HERE, *command)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, said + errors
    assert read_json(run.folder / "manifest.json")["stages"]["03_evaluate"]["status"] == "finished"
    assert set(read_json(run.metrics)["cases"]) == set(PARTS["test"])
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    for path in files:
        read_whole(path)
    assert [path for path in files if PART in str(path)] == []
    assert run.report.stat().st_mtime_ns >= run.metrics.stat().st_mtime_ns
