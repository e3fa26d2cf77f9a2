"""This suite, for one job of benchmarks/accuracy.py: the defaults of notebook 02 in the demo's short epochs."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import torch

from brats_helpers.data.cache import prepare
from brats_helpers.data.cases import survey
from brats_helpers.evaluation.inference import load_networks, predict_files
from brats_helpers.suite.environment import ROOT
from brats_helpers.suite.plan import read_notebooks, read_profile
from brats_helpers.training.loop import fit
from brats_helpers.training.preflight import SLICES
from brats_helpers.training.settings import Settings


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    cases = {case.id: case for case in survey(job["data"], job["modalities"]).complete(skip_incomplete=True)}
    packed = {p.id: p for p in prepare(list(cases.values()), cache_dir=Path(job["cache"]), workers=job["workers"])}
    train = [packed[case_id] for case_id in job["parts"]["train"]]
    val = [packed[case_id] for case_id in job["parts"]["val"]]

    settings = demo_settings(
        modalities=",".join(job["modalities"]),
        encoder_weights=job["configuration"],
        epochs=1000,
        patience=0,
        minutes=job["seconds"] / 60,
        batch_size=SLICES[job["device"]],
    )
    device = torch.device(job["device"])
    how = {"workers": 0, "checkpoint_minutes": 0, "deterministic": False, "tracker": "none"}
    history = fit(settings, train, val, Path(job["folder"]), device=device, **how)
    print(f"epochs: {len(history)} of {settings.slices_per_epoch} slices, batch {settings.batch_size}")

    networks = load_networks([Path(job["folder"]) / "checkpoints" / "best.pt"], device=device)
    test = [cases[case_id] for case_id in job["parts"]["test"]]
    for _ in predict_files(networks, test, Path(job["out"]), flips=False):
        pass


def demo_settings(variant: str = "", **changes) -> Settings:
    """The defaults of notebook 02 as the demo's profile changes them, with `changes`, and last a variant as text."""
    own = read_notebooks(ROOT)["02_train"].parameters
    demo = read_profile(ROOT / "profiles" / "demo.yaml")
    values = {name: parameter.default for name, parameter in own.items()} | demo
    values = {field.name: values[field.name] for field in fields(Settings) if field.name in values}
    return Settings.parse(variant, **values | {"seed": 0} | changes)


if __name__ == "__main__":
    main()
