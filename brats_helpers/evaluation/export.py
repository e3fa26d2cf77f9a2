"""Export a run's network: as a model file, or as ONNX with a description of the steps before and after it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from brats_helpers.evaluation.card import model_card
from brats_helpers.evaluation.onnx import KIND, VERSION
from brats_helpers.evaluation.packaged import check_scores
from brats_helpers.evaluation.postprocess import NO_RULES
from brats_helpers.files import read_json, write_json
from brats_helpers.labels import CLASSES, DataError, classes_to_labels
from brats_helpers.runs import Run
from brats_helpers.training.checkpoint import read_checkpoint
from brats_helpers.training.model import SIDE_MULTIPLE, rebuild
from brats_helpers.training.model_zip import SUFFIXES, write_model

NORMALISATION = "z-score per modality over its non-zero voxels; background stays 0"


def export_model(run: Run, path: Path, *, half: bool = False, real: Sequence[Path] = ()) -> Path:
    """Write the network of a run as a model file, see `model_zip.write_model`.

    Args:
        run: whose best checkpoint is written.
        path: ends in `.zip`, or in `.safetensors`; then the model card goes beside it, as `.md`.
        half: store weights in half precision.
        real: files with the network's scores on real patients, see `packaged.KEYS`; they go into file and card.

    Raises:
        DataError: the run has no network yet, `path` has another suffix, or a file of `real` holds no scores.
    """
    _check_suffix(path, *SUFFIXES)
    saved = read_checkpoint(run.best)
    saved["settings"]["encoder_weights"] = Path(saved["settings"]["encoder_weights"]).name  # no folder of this machine
    listed = [check_scores(read_json(file), file) for file in real]
    facts = {"normalisation": NORMALISATION, "postprocess": _postprocess(run), "scores": _scores(run), "real": listed}
    write_model(path, saved, facts=facts, card=model_card(run, real=listed, name=path.name), half=half)
    return path


def export_onnx(run: Run, path: Path) -> Path:
    """Write the network of a run as ONNX, and its description beside it as `<name>.json`.

    The network maps float32 (batch, channels, height, width) to logits (batch, 4, height, width); batch, height and
    width are free, and height and width are multiples of 32.

    Raises:
        DataError: the run has no network of slices, `path` does not end in `.onnx`, or the exporter is not installed.
    """
    _check_suffix(path, ".onnx")
    saved = read_checkpoint(run.best)
    settings = saved["settings"]
    if settings["patch_size"]:
        raise DataError(f"{settings['encoder']} predicts 3D patches; only networks of slices are exported as ONNX.")
    network = rebuild(saved).eval()
    write_onnx(network, saved["in_channels"], path)
    write_json(path.with_suffix(".json"), _description(run, saved))
    return path


def write_onnx(network: torch.nn.Module, channels: int, path: Path) -> None:
    """Write a network of slices, in `eval()` and with this number of input channels, as ONNX; see `export_onnx`."""
    example = torch.zeros(2, channels, 2 * SIDE_MULTIPLE, 3 * SIDE_MULTIPLE)
    free = {"images": {0: "batch", 2: "height", 3: "width"}, "logits": {0: "batch", 2: "height", 3: "width"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.onnx.export(
            network,
            (example,),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes=free,
            opset_version=17,
            dynamo=False,
        )
    except (ImportError, torch.onnx.errors.OnnxExporterError) as error:
        raise DataError(f"ONNX cannot be written here ({error}). pip install 'brats-helpers[onnx]'.") from error


def _description(run: Run, saved: Mapping) -> dict:
    """What somebody without this suite needs to use the ONNX file."""
    settings, facts = saved["settings"], saved.get("facts", {})
    numbers = classes_to_labels(np.arange(len(CLASSES), dtype=np.uint8))
    return {
        "kind": KIND,
        "version": VERSION,
        "input": {
            "name": "images",
            "modalities": list(settings["modalities"]),
            "context_slices": settings["context_slices"],
            "channel_order": "slices from low to high, and the modalities of each in order",
            "orientation": "LPS; slices along the third axis, rows along the second, columns along the first",
            "spacing_mm": facts.get("spacing_mm"),
            "normalisation": NORMALISATION,
            "side_multiple": SIDE_MULTIPLE,
            "crop": "each slice to its brain, at the centre of the smallest sides in multiples of side_multiple",
        },
        "output": {"name": "logits", "classes": list(CLASSES), "labels": numbers.tolist(), "choice": "argmax"},
        "postprocess": _postprocess(run),
        "checkpoint": {name: value for name, value in saved.items() if name != "model"},
        "scores": _scores(run),
    }


def _postprocess(run: Run) -> dict:
    """The rules that the run chose on its validation patients."""
    chosen = read_json(run.postprocess, {})
    return chosen.get("rules", chosen) or dict(vars(NO_RULES))


def _scores(run: Run) -> dict:
    """The summary of the run's test scores and the rule they follow; empty before notebook 03."""
    metrics = read_json(run.metrics, {})
    return {name: metrics[name] for name in ("convention", "simulated", "summary", "leakage") if name in metrics}


def _check_suffix(path: Path, *suffixes: str) -> None:
    if path.suffix not in suffixes:
        raise DataError(f"--out {path}: expected a name that ends in {' or '.join(suffixes)}.")
