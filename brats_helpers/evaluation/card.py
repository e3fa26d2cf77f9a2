"""The model card of a run: what its network learnt from, how it scored, and what it is not for."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from brats_helpers.evaluation.packaged import real_lines, whole_dice
from brats_helpers.files import read_json
from brats_helpers.labels import REGIONS
from brats_helpers.runs import Run
from brats_helpers.scoring.statistics import interval_text
from brats_helpers.training.checkpoint import read_checkpoint
from brats_helpers.training.settings import NAMED_WEIGHTS


def model_card(run: Run, *, real: Sequence[Mapping] = (), name: str = "model.zip") -> str:
    """The model card of a run as Markdown, with the front matter that model hubs read.

    Args:
        run: the run.
        real: scores on real patients, see `packaged.KEYS`.
        name: of the file that the card goes with.

    Raises:
        DataError: the run has no network yet, see `checkpoint.read_checkpoint`.
    """
    saved, metrics = read_checkpoint(run.best), read_json(run.metrics, {})
    manifest = run.manifest
    settings, own = saved["settings"], manifest.get("patients", {})  # without the patients of the initial weights
    simulated = bool(manifest.get("simulated"))
    start = NAMED_WEIGHTS.get(settings["encoder_weights"], Path(settings["encoder_weights"]).name)
    unrecorded = saved.get("facts", {}).get("unrecorded")
    patients = "simulated patients" if simulated else "patients"
    lines = _front_matter(run.name, metrics, real, simulated=simulated, terms="other" if unrecorded else "mit")
    lines += [
        f"# {run.name}: brain-tumour segmentation on MRI",
        "",
        "## What it does",
        "",
        f"The network reads {_input(settings)} and assigns each voxel to background, necrotic and non-enhancing core,"
        f" oedema or enhancing tumour. It expects co-registered, skull-stripped volumes, normalised to z-scores over"
        " the brain. It is a network of the `brats_helpers` suite and runs with"
        f" `python -m brats_helpers predict --checkpoint {name} --out FOLDER PATIENTS`.{_without(settings)}",
        "",
        "## What it learnt from",
        "",
        f"- {own.get('train', len(saved['train_cases']))} training and"
        f" {own.get('val', len(saved['val_cases']))} validation {patients}:"
        f" {_without_folders(manifest.get('origin', 'origin not recorded'))}.",
        f"- Encoder {settings['encoder']}, starting from {start}, seed {settings['seed']}, epoch {saved['epoch']}.",
        *([f"- Which scans {unrecorded} has seen, and under which terms, is on its own page."] if unrecorded else ()),
        *_made_by(manifest),
        "",
        "## How it scored",
        "",
        *(_scores(metrics, patients) if metrics.get("summary") or not real else ()),
        *real_lines(real),
        "",
        "## What it is not for",
        "",
        "It is for research and teaching. It is not a medical device, and nobody has tested it for diagnosis, treatment"
        " planning or any decision about a patient. It may fail on other scanners, after resections, on children and on"
        " metastases.",
    ]
    if simulated:
        lines += ["", "It has seen only simulated patients. Scores on simulated patients say nothing about real scans."]
    return "\n".join(lines) + "\n"


def _without_folders(text: str) -> str:
    """Remove this machine's folders from the paths in a text that will be shared."""
    return re.sub(r"(?<![\w.~:/])~?(?:/[^/\s,:'\"]+)*/(?=[^/\s])", "", text)


def _without(settings: Mapping) -> str:
    """A sentence about missing modalities, if the network was trained with `modality_dropout`."""
    share = settings.get("modality_dropout", 0.0)
    return f" Patients may lack modalities: in {share:.0%} of the training samples some were hidden." if share else ""


def _made_by(manifest: Mapping) -> list[str]:
    """The command and the machine, as far as the manifest records them."""
    if "command" not in manifest:
        return []
    device = manifest.get("device", {}).get("device", "a machine that was not recorded")
    return [
        f"- `{_without_folders(manifest['command'])}`, {device}, revision {manifest.get('revision', 'not recorded')}."
    ]


def _input(settings: Mapping) -> str:
    modalities = ", ".join(settings["modalities"])
    if settings["patch_size"]:
        return f"3D patches of {settings['patch_size']}³ voxels of {modalities}"
    slices = 2 * settings["context_slices"] + 1
    return f"axial slices of {modalities}" if slices == 1 else f"{slices} neighbouring axial slices of {modalities}"


def _front_matter(name: str, metrics: Mapping, real: Sequence[Mapping], *, simulated: bool, terms: str) -> list[str]:
    front = {
        "license": terms,
        "library_name": "brats_helpers",
        "pipeline_tag": "image-segmentation",
        "tags": ["brain-tumour", "BraTS", "MRI", "U-Net"],
        "metrics": ["dice"],
    }
    results = []
    if (summary := metrics.get("summary")) and not metrics.get("leakage"):  # scores of seen patients are not valid
        found = {region: summary[region]["dice"]["mean"] for region in REGIONS if region in summary}
        dice = {region: mean for region, mean in found.items() if mean is not None}
        data, kind = ("simulated patients", "simulated") if simulated else ("BraTS", "brats")
        results.append(_result(data, kind, dice))
    results += [_result(f"{one['n']} real patients, {one['patients']}", "brats", whole_dice(one)[1]) for one in real]
    if results:
        front["model-index"] = [{"name": name, "results": results}]
    return ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def _result(data: str, kind: str, dice: Mapping[str, float]) -> dict:
    """One entry of the model index: the mean Dice of each region on one data set."""
    metrics = [{"type": "dice", "name": f"Dice {region}", "value": round(value, 4)} for region, value in dice.items()]
    return {"task": {"type": "image-segmentation"}, "dataset": {"name": data, "type": kind}, "metrics": metrics}


def _scores(metrics: Mapping, patients: str) -> list[str]:
    if not metrics.get("summary"):
        return ["Not scored yet."]
    rows = ["| region | mean Dice | 95 % interval | mean HD95 in mm |", "| --- | --- | --- | --- |"]
    for region in REGIONS:
        dice, hd95 = (metrics["summary"][region][name] for name in ("dice", "hd95_mm"))
        if not dice["n"]:  # the rule leaves every patient out
            rows.append(f"| {region} | - | - | - |")
            continue
        interval = interval_text(dice["ci95"], dice["n"])
        rows.append(f"| {region} | {dice['mean']:.3f} | {interval} | {hd95['mean']:.1f} |")
    note = f"{len(metrics['cases'])} test {patients}, scored by {metrics['convention']}."
    leakage = metrics.get("leakage")
    if leakage:
        note += f" These scores are not valid: the network had seen {', '.join(leakage)}."
    return [*rows, "", note]
