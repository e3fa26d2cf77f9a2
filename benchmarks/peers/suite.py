"""This suite, for one job of benchmarks/accuracy.py: the defaults of notebook 02 in the demo's short epochs.

With the configuration `untrained` the packaged network predicts as it is.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

import torch

from brats_helpers.data.cache import Packed, prepare
from brats_helpers.data.cases import survey
from brats_helpers.evaluation.inference import load_networks, predict_files
from brats_helpers.suite.environment import ROOT
from brats_helpers.suite.plan import read_notebooks, read_profile
from brats_helpers.training.loop import fit
from brats_helpers.training.model_zip import packaged_model
from brats_helpers.training.preflight import SLICES
from brats_helpers.training.settings import Settings


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    cases = {case.id: case for case in survey(job["data"], job["modalities"]).complete(skip_incomplete=True)}
    packed = {p.id: p for p in prepare(list(cases.values()), cache_dir=Path(job["cache"]), workers=job["workers"])}
    device = torch.device(job["device"])
    checkpoint = packaged_model() if job["configuration"] == "untrained" else train(job, packed, device)
    networks = load_networks([checkpoint], device=device)
    test = [cases[case_id] for case_id in job["parts"]["test"]]
    for _ in predict_files(networks, test, Path(job["out"]), flips=False):
        pass


def train(job: dict, packed: dict[str, Packed], device: torch.device) -> Path:
    settings = demo_settings(
        modalities=",".join(job["modalities"]),
        encoder_weights=job["configuration"],
        epochs=1000,
        patience=0,
        minutes=job["seconds"] / 60,
        batch_size=SLICES[job["device"]],
    )
    how = {"workers": 0, "checkpoint_minutes": 0, "deterministic": False, "tracker": "none"}
    parts = [[packed[case_id] for case_id in job["parts"][part]] for part in ("train", "val")]
    history = fit(settings, *parts, Path(job["folder"]), device=device, **how)
    print(f"epochs: {len(history)} of {settings.slices_per_epoch} slices, batch {settings.batch_size}")
    return Path(job["folder"]) / "checkpoints" / "best.pt"


def demo_settings(variant: str = "", **changes) -> Settings:
    """The defaults of notebook 02 as the demo's profile changes them, with `changes`, and last a variant as text."""
    own = read_notebooks(ROOT)["02_train"].parameters
    demo = read_profile(ROOT / "profiles" / "demo.yaml")
    values = {name: parameter.default for name, parameter in own.items()} | demo
    values = {field.name: values[field.name] for field in fields(Settings) if field.name in values}
    return Settings.parse(variant, **values | {"seed": 0} | changes)


if __name__ == "__main__":
    main()
