"""Interactive views and the report's viewer."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from matplotlib.colors import ListedColormap

from brats_helpers.data.cases import Case
from brats_helpers.data.nifti import read_mask
from brats_helpers.labels import CLASSES, USUAL
from brats_helpers.report.plots.patients import around, fullest, load_scan, nilearn_input, upright
from brats_helpers.report.plots.style import COLOURS, PRINTED

if TYPE_CHECKING:
    from IPython.display import HTML


def interactive_view(case: Case, modality: str, *, simulated: bool, centre: list[float] | None = None):
    """A viewer of three planes to click through. As a cell's last value it is shown; `.save_as_html(path)` saves it.

    Args:
        case: the patient, with or without a mask.
        modality: the background.
        simulated: whether the patient is.
        centre: where the planes meet at first, in mm; None takes the tumour's centre.

    Returns:
        nilearn's view, at half the resolution so that the page stays light. It does not turn its crosshair
        with `radiological=True`, so this is the one figure with the patient's left on the left.
    """
    from nilearn import plotting

    image, mask, tumour, _ = nilearn_input(case, modality)
    centre = centre or tumour
    if mask is None:
        mask = nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine)
    colours = ListedColormap([COLOURS[name] for name in CLASSES])
    view = plotting.view_img(
        mask.slicer[::2, ::2, ::2], bg_img=image.slicer[::2, ::2, ::2], cut_coords=centre,
        threshold=0.5 if np.any(mask.dataobj) else 0, cmap=colours, vmin=0, vmax=3, symmetric_cmap=False,
        colorbar=False, opacity=0.6, resampling_interpolation="nearest", black_bg=True, dim=0, width_view=900,
    )  # fmt: skip
    headline = f"{case.id} · {PRINTED[modality]}{' · simulated' * simulated} · here the patient's left is on the left"
    view.html = view.html.replace("<body>", f"<body><p>{html.escape(headline)}</p>", 1)
    view.html = re.sub(r"<link rel=\"icon\".*?>", "", view.html, flags=re.DOTALL)  # nilearn's, from the network
    return view.resize(view.width, view.height + 50)


_TOGGLED = """<style>
.toggled div {{ position: relative; width: {width}px; height: {height}px }}
.toggled iframe {{ position: absolute; visibility: hidden; border: 0 }}
.toggled .show-reference:checked ~ div .reference,
.toggled .show-prediction:checked ~ div .prediction {{ visibility: visible }}
</style>
<div class="toggled">
<input type="radio" name="toggled" class="show-prediction" id="toggle-p" checked>
<label for="toggle-p">prediction</label>
<input type="radio" name="toggled" class="show-reference" id="toggle-r">
<label for="toggle-r">reference</label>
<div>{prediction}{reference}</div>
</div>"""


def toggled_view(case: Case, prediction: Path, modality: str, *, numbering: str, simulated: bool) -> HTML:
    """The viewer of `interactive_view` for a patient's prediction and reference, with a switch between the two.

    Args:
        case: a labelled patient.
        prediction: its `<case>_seg.nii.gz`.
        modality: the background.
        numbering: of the labels in the prediction.
        simulated: whether the patient is.

    Returns:
        As a cell's last value it is shown; `.data` is its HTML, which needs no network.
    """
    from IPython.display import HTML

    centre = nilearn_input(case, modality)[2]
    frames = {}
    for name, shown in {"reference": case, "prediction": replace(case, seg=prediction, numbering=numbering)}.items():
        view = interactive_view(shown, modality, simulated=simulated, centre=centre)
        frames[name] = view.get_iframe().replace("<iframe", f'<iframe class="{name}" title="{name}"', 1)
    return HTML(_TOGGLED.format(width=view.width, height=view.height, **frames))


def viewer_tiles(case: Case, prediction: Path, numbering: str = USUAL) -> dict[str, object]:
    """A patient's brain for the report's viewer: images that a browser can cut in three planes.

    Axial slices lie side by side as tiles, from left to right and top to bottom. Axes run right to left, front to
    back, feet to head, as in every figure here.

    Args:
        case: a labelled patient.
        prediction: its `<case>_seg.nii.gz`.
        numbering: of the labels in the prediction.

    Returns:
        `shape`, `spacing` (mm) and `origin` (of the brain's box in the volume), each along X, Y, Z; `columns` of tiles;
        `start`, a voxel of the box in the slices with most tumour; `images`, by modality a lossy WebP of grey values
        between `window()`'s ends; `labels`, a PNG whose grey values are 64 x predicted + 16 x reference class + 8.
    """
    scan = load_scan(case, tuple(case.images))
    image = case.read(next(iter(case.images)))[1]
    predicted = upright(nib.Nifti1Image(read_mask(prediction, numbering), image.affine))[0]
    box = around(scan.focus | (predicted > 0) | np.any([volume != 0 for volume in scan.volumes.values()], axis=0))
    focus = scan.focus[tuple(box)]
    shape = focus.shape
    columns = int(np.ceil(np.sqrt(shape[2])))
    images = {}
    for name, volume in scan.volumes.items():
        low, high = scan.window(name)
        grey = np.clip((volume[tuple(box)] - low) / max(high - low, 1e-6), 0, 1) * 255
        images[name] = _encoded(_tiles(grey.astype(np.uint8), columns), "WEBP", quality=80, method=2)
    both = (64 * predicted + 16 * scan.mask + 8)[tuple(box)].astype(np.uint8)
    return {
        "shape": list(shape),
        "spacing": [float(size) for size in scan.spacing_mm],
        "origin": [int(side.start) for side in box],
        "columns": columns,
        "start": [fullest(focus, axis) for axis in range(3)],
        "images": images,
        "labels": _encoded(_tiles(both, columns), "PNG", optimize=True),
    }


def _tiles(volume: np.ndarray, columns: int) -> np.ndarray:
    """The axial slices of (X, Y, Z) side by side, `columns` in a row."""
    width, height, depth = volume.shape
    rows = -(-depth // columns)
    padded = np.zeros((rows * columns, height, width), volume.dtype)
    padded[:depth] = volume.transpose(2, 1, 0)
    return padded.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


def _encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()
