"""A finished run of tiny patients, as the suite leaves one, one of them with a name that would be markup."""

import base64
import csv
import io
import json
import shutil
from pathlib import Path

import nbformat
import numpy as np
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from brats_helpers.data.audit import examine
from brats_helpers.data.cases import survey
from brats_helpers.data.nifti import read_mask, read_nifti, write_mask
from brats_helpers.data.splits import fingerprint, write_splits
from brats_helpers.evaluation.folders import score_files
from brats_helpers.files import write_json
from brats_helpers.report.plots.style import register
from brats_helpers.runs import NEEDS, ONCE, PER_FOLD, Run
from brats_helpers.scoring.rules import CONVENTIONS
from brats_helpers.scoring.scores import collect, write_cases_csv
from brats_helpers.scoring.statistics import summarise
from brats_helpers.suite.environment import ROOT
from brats_helpers.suite.folds import gather, member, shares
from brats_helpers.training.checkpoint import FORMAT
from brats_helpers.training.model import DECODER, PACKAGED_ENCODER, build_model
from tests.conftest import write_tiny_case

HOSTILE = "<img src=x onerror=alert(1)>"
MODALITIES = ["flair", "t1ce"]
PARTS = {"train": ["Train_0"], "val": ["Val_0"], "test": ["Exact_0", HOSTILE, "NoET_0"]}
TITLES = {
    "01_balance": f"Balance · {HOSTILE} · simulated",
    "01_modalities": "Modalities · simulated",
    "02_curves": "Training · simulated",
    "03_scores": "Scores · simulated",
    "03_overlays": "Prediction against reference · simulated",
}


def png(title: str = "") -> bytes:
    info, file = PngInfo(), io.BytesIO()
    info.add_text("Title", title)
    Image.new("RGB", (60, 40), "#0072B2").save(file, "PNG", pnginfo=info)
    return file.getvalue()


def gif() -> bytes:
    file = io.BytesIO()
    Image.new("L", (2, 2)).save(file, "GIF", comment="A_1 · slices · simulated".encode())
    return file.getvalue()


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def write_tiny_run(root: Path) -> Run:
    """Write patients, predictions, scores, figures, notebooks and all; `NoET_0` is predicted without its ET."""
    data, run = root / "data", Run(root / "runs" / "tiny")
    for seed, case_id in enumerate(case_id for ids in PARTS.values() for case_id in ids):
        write_tiny_case(data, case_id, seed=seed, modalities=MODALITIES)
    write_tiny_case(data, "Unlabelled_0", seed=9, modalities=MODALITIES, labelled=False)
    found = survey(data, MODALITIES)
    cases = {case.id: case for case in found.cases}
    known = examine(found, found.cases, workers=1, cache_dir=None)
    contents = {case_id: facts["content"] for case_id, facts in known.items()}
    facts = {"seed": 0, "fingerprint": fingerprint(contents), "contents": contents}
    write_splits(run.splits, PARTS, unlabelled=["Unlabelled_0"], **facts)

    run.predictions.mkdir()
    scores = {}
    for case_id in PARTS["test"]:
        truth = read_mask(cases[case_id].seg, cases[case_id].numbering)
        pred = {"Exact_0": truth, HOSTILE: np.roll(truth, 1, axis=0), "NoET_0": np.where(truth == 3, 1, truth)}[case_id]
        path = run.predictions / f"{case_id}_seg.nii.gz"
        write_mask(path, pred.astype(np.uint8), read_nifti(cases[case_id].images["flair"]))
        scores[case_id] = score_files(path, cases[case_id].seg, convention="brats2020")
    write_mask(run.predictions / "Unlabelled_0_seg.nii.gz", truth, read_nifti(cases["Unlabelled_0"].images["flair"]))
    metrics = {"convention": CONVENTIONS["brats2020"], "rule": "brats2020", "simulated": True, "cases": scores}
    metrics |= {"summary": summarise(scores), "not_scored": {"Unlabelled_0": f"unlabelled {HOSTILE}"}}
    write_json(run.metrics, metrics)
    write_cases_csv(run.cases_csv, metrics)

    with open(run.history, "w", newline="") as file:
        names = [f"dice_{name}" for name in ("WT", "TC", "ET", "NCR", "ED")]
        rows = csv.writer(file)
        rows.writerow(["epoch", "train_loss", "val_loss", *names, "lr", "slices_per_s", "seconds"])
        for epoch, (loss, dice) in enumerate([(1.0, 0.5), (0.6, 0.8), (0.5, 0.7)], start=1):
            rows.writerow([epoch, loss, loss, *[dice] * 5, [1e-3, 5e-4, 1e-6][epoch - 1], 9.0, 20.0 * epoch])

    settings = {"modalities": ("flair", "t1ce"), "encoder": PACKAGED_ENCODER, "encoder_weights": "imagenet"}
    settings |= {"context_slices": 0, "patch_size": 0, "decoder": DECODER, "augment": "basic", "frozen_epochs": 3}
    settings |= {"epochs": 3, "patience": 2, "minutes": 0.0}
    network = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=2)
    run.checkpoints.mkdir()
    checkpoint = {"format": FORMAT, "settings": settings, "in_channels": 2, "model": network.state_dict(), "epoch": 2}
    torch.save(checkpoint | {"train_cases": PARTS["train"], "val_cases": PARTS["val"]}, run.best)

    run.figures.mkdir()
    for name, title in TITLES.items():
        (run.figures / f"{name}.png").write_bytes(png(title))
        register(run.figures / f"{name}.png")
    (run.figures / "01_scroll.gif").write_bytes(gif())
    run.record_checks("00_setup", {f"check {k}": (True, "seen") for k in range(7)})
    (run.figures / "01_view 1.html").write_text("a viewer")
    run.notebooks.mkdir()
    for stage in NEEDS:
        nbformat.write(_notebook(stage), run.notebooks / f"{stage}.ipynb")
    how = {"command": "./run_all.sh --run tiny", "revision": "0123abc", "versions": {"torch": "2.4"}}
    entry = {"status": "finished", "seconds": 61.0, "parameters": {"epochs": 3, "place": HOSTILE}} | how
    run.record(
        profile="tiny", stages=dict.fromkeys(NEEDS, entry), **how,
        device={"device": "CPU"}, data=str(data), origin=f"tiny patients of {HOSTILE}", simulated=True,
        modalities=MODALITIES, cache_dir=str(root / "cache"), best_epoch=2,
    )  # fmt: skip
    return run


def write_tiny_folds(root: Path) -> Run:
    """The tiny run as a cross-validation of two folds, put together from what it scored."""
    run = write_tiny_run(root)
    tests = [PARTS["test"][:1], PARTS["test"][1:]]
    parts = [{"train": PARTS["train"], "val": PARTS["val"], "test": test} for test in tests]
    write_json(run.splits, json.loads(run.splits.read_text()) | {"folds": parts, "unlabelled": []})
    scores, members = json.loads(run.metrics.read_text())["cases"], []
    for k, part in enumerate(shares(run)):
        own = member(run, f"folds/{k}", part)
        made = {stage: run.manifest["stages"][stage] for stage in PER_FOLD}
        own.record(stages=made, shared=True, expected=PER_FOLD)
        shutil.copy(run.history, own.history)
        shutil.copytree(run.checkpoints, own.checkpoints)
        shutil.copytree(run.predictions, own.predictions)
        cases = {case_id: scores[case_id] for case_id in part["test"]}
        write_json(own.metrics, collect(cases, convention="brats2020", simulated=True, not_scored={}, leakage=[]))
        members.append(own)
    for path in (run.metrics, run.history, run.best, *run.figures.glob("0[23]*"), *run.notebooks.glob("0[234]*")):
        path.unlink()
    gather(run, members, device="cpu", flips=False, convention="brats2020", labels="2020")
    stages = run.manifest["stages"]
    del stages["04_advanced"]
    run.record(shared=True, stages=stages, expected=[*ONCE, *PER_FOLD])
    return run


def _notebook(stage: str):
    """A notebook as executed: parameters, code that keeps figures, outputs of every kind."""
    names = [f'run.figures / "{name}.png"' for name in TITLES if name.startswith(stage[:2])]
    outputs = [
        new_output("stream", text=f"case {HOSTILE}\n7 of 7 checks held\n"),
        new_output("display_data", data={"image/png": encoded(png()), "text/plain": "<Figure>"}),
        new_output("display_data", data={"image/gif": encoded(gif()), "text/plain": "<Image>"}),
        new_output("display_data", data={"text/html": "<iframe srcdoc='<script>1</script>'></iframe>"}),
    ]
    cells = [
        nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4).cells[0],  # with its badges
        new_code_cell("epochs: int = 3  # passes", metadata={"tags": ["parameters"]}, execution_count=1),
        new_code_cell("\n".join(names), execution_count=2, outputs=outputs),
    ]
    return new_notebook(cells=cells)
