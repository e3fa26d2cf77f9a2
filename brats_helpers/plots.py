"""Every figure of the notebooks, one function each.

Each function returns a matplotlib figure that is shown once, as a cell's last value, and kept by
`save_figure`. Patients are drawn as radiologists look at them: anterior (or head) up, the
patient's right on the left. A region has one colour wherever it appears, and a line style and a
marker besides, for print and for eyes that tell few colours apart.
"""

import functools
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from brats_helpers.cache import Packed, normalise
from brats_helpers.cases import CLASSES, REGIONS, Case, read_image, read_mask, spacing_mm
from brats_helpers.files import whole_file
from brats_helpers.uncertainty import entropy

COLOURS = {
    "background": "#8C8C8C",
    "NCR": "#009E73",
    "ED": "#56B4E9",
    "ET": "#E69F00",
    "WT": "#0072B2",
    "TC": "#CC79A7",
}
"""The one colour of each class and region (Okabe and Ito's palette, made for colour-blind readers)."""
_DASHES = {"background": "-", "NCR": "-.", "ED": "--", "ET": "-", "WT": "--", "TC": "-."}
_MARKERS = {"background": ".", "NCR": "^", "ED": "s", "ET": "o", "WT": "s", "TC": "^"}
_MEANINGS = {
    "NCR": "necrotic and non-enhancing core",
    "ED": "oedema",
    "ET": "enhancing tumour",
    "WT": "whole tumour",
    "TC": "tumour core",
}
PRINTED = {"flair": "FLAIR", "t1": "T1", "t1ce": "T1ce", "t2": "T2"}
"""The modalities as people write them."""
_PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}

_INK, _SOFT = "#222222", "#696969"
_ERROR = "#D55E00"
_DASHED = (0, (2.5, 1.5))
_PART_INK = ("#2B2B2B", "#808080", "#C4C4C4")  # train, val, test; and runs side by side
_WIDTH = 10.0  # inches; 1,000 pixels in a notebook
_MOST = 60  # patients that a figure names
_PERCENTILES = (1, 99.5)
_Z_WINDOW = (-2.5, 3.5)
_STYLE = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "text.color": _INK,
    "text.parse_math": False,  # a `$` in a patient's name is a `$`
    "xtick.color": _INK,
    "ytick.color": _INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
}


def _styled(draw):
    """Draw in the house style, and take the figure off pyplot's list, or a notebook would show it twice."""

    @functools.wraps(draw)
    def styled(*args, **kwargs) -> Figure:
        with plt.rc_context(_STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # the layout needs the style too
        plt.close(figure)
        return figure

    return styled


def save_figure(figure: Figure, path: Path) -> Figure:
    """Write a figure as PNG, its title in the file's metadata, and give it back to be shown.

    The report has the title for those who cannot see the figure.
    """
    with whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Title": figure.get_label()})
    return figure


def _title(figure: Figure, headline: str, detail: str, simulated: bool) -> None:
    """A headline, which says if the patients are simulated, and a line of detail above the figure."""
    points = 72 * figure.get_figheight()
    headline += " · simulated" * simulated
    figure.set_label(f"{headline} · {detail}")
    y = None if figure.get_layout_engine() else 1 - 3 / points
    figure.suptitle(f"{headline}\n", x=0.01, y=y, ha="left", fontsize=12, weight="bold", linespacing=1.4)
    figure.text(0.01, 1 - 22 / points, detail, va="top", fontsize=10, color=_SOFT)  # on the headline's empty line


def _named(name: str) -> str:
    """A class or region with its meaning."""
    return f"{name} {_MEANINGS[name]}"


# Patients


@dataclass
class _Scan:
    """A patient turned so that the axes run right to left, front to back, feet to head.

    Attributes:
        volumes: by modality, shape (X, Y, Z), intensities as stored.
        mask: class indices of the same shape, or None.
        spacing_mm: voxel size along X, Y, Z.
    """

    volumes: dict[str, np.ndarray]
    mask: np.ndarray | None
    spacing_mm: tuple[float, ...]

    @functools.cached_property
    def box(self) -> list[slice]:
        """The brain's box along X, Y, Z."""
        return _around(next(iter(self.volumes.values())) != 0)

    @functools.cached_property
    def focus(self) -> np.ndarray:
        """Tumour, bool (X, Y, Z); without a mask, or with an empty one, the brain."""
        tumour = None if self.mask is None else self.mask > 0
        return tumour if tumour is not None and tumour.any() else next(iter(self.volumes.values())) != 0

    def window(self, modality: str) -> tuple[float, float]:
        """Darkest and brightest intensity shown."""
        volume = self.volumes[modality]
        return tuple(np.percentile(volume[volume != 0], _PERCENTILES))

    def cut(self, volume: np.ndarray, plane: str, at: int, box: Sequence[slice] | None = None) -> np.ndarray:
        """One slice of a volume within the box, as an image: rows down, columns to the right."""
        axis = _PLANES[plane]
        within = list(box or self.box)
        within[axis] = at
        image = volume[tuple(within)].T
        return image if plane == "axial" else image[::-1]

    def aspect(self, plane: str) -> float:
        """Height of a voxel over its width."""
        across, down = [size for axis, size in enumerate(self.spacing_mm) if axis != _PLANES[plane]]
        return down / across


def _around(inside: np.ndarray) -> list[slice]:
    """The box of the true voxels, with four voxels of margin where the volume has them."""
    sides = [np.flatnonzero(inside.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    return [slice(max(side[0] - 4, 0), min(side[-1] + 5, n)) for side, n in zip(sides, inside.shape, strict=True)]


def _load(case: Case, modalities: Sequence[str]) -> _Scan:
    volumes = {}
    for name in modalities:
        image = read_image(case.images[name])[1]
        volumes[name], spacing = _upright(image)
    mask = _upright(nib.Nifti1Image(read_mask(case.seg), image.affine))[0] if case.seg else None
    return _Scan(volumes, mask, spacing)


def _upright(image: nib.Nifti1Image) -> tuple[np.ndarray, tuple[float, ...]]:
    """Voxels with axes towards left, posterior, superior (BraTS files lie so already), and their size in mm."""
    wanted = nib.orientations.axcodes2ornt("LPS")
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))
    return np.asanyarray(turned.dataobj), spacing_mm(turned)


def _panels(rows: int, columns: int, shape: tuple[float, float], legend: bool = True) -> tuple[Figure, np.ndarray]:
    """A grid of black panels for images of `shape` (height, width), as wide as a notebook."""
    height = (_WIDTH / max(columns, 3) - 0.08) * shape[0] / shape[1] + 0.3
    figure, axes = plt.subplots(rows, columns, figsize=(_WIDTH, rows * height + 0.55 + 0.3 * legend), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    return figure, axes


def _show(ax: Axes, image: np.ndarray, window: tuple[float, float], title: str = "", aspect: float = 1) -> None:
    ax.imshow(image, vmin=window[0], vmax=window[1], aspect=aspect)
    ax.set_title(title)


def _overlay(ax: Axes, classes: np.ndarray) -> None:
    """Each class as a translucent fill with an outline in its colour."""
    fill = np.zeros((*classes.shape, 4))
    for index, name in enumerate(CLASSES[1:], start=1):
        fill[classes == index] = to_rgba(COLOURS[name], 0.35)
        _outline(ax, classes == index, COLOURS[name])
    ax.imshow(fill, aspect=ax.get_aspect())


def _outline(ax: Axes, inside: np.ndarray, colour: str, dash="-", width: float = 1.1) -> None:
    if inside.any():
        ax.contour(inside.astype(float), [0.5], colors=[colour], linewidths=width, linestyles=[dash])


def _class_legend(figure: Figure) -> None:
    patches = [
        Patch(facecolor=to_rgba(COLOURS[name], 0.35), edgecolor=COLOURS[name], label=_named(name))
        for name in CLASSES[1:]
    ]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches))


def _intensities(case: Case) -> str:
    low, high = _PERCENTILES
    seg = "" if case.seg else " · no segmentation"
    return f"intensity in arbitrary units, percentiles {low} to {high} of the brain · patient's right on the left{seg}"


@_styled
def modalities(case: Case, *, simulated: bool) -> Figure:
    """Every modality of a case on the axial slice with most tumour, without and with the segmentation."""
    scan = _load(case, tuple(case.images))
    at = _fullest(scan.focus, _PLANES["axial"])
    names = list(case.images)
    rows = 1 if scan.mask is None or len(names) <= 2 else 2
    columns = len(names) if scan.mask is None or rows == 2 else 2 * len(names)
    figure, axes = _panels(rows, columns, scan.cut(scan.focus, "axial", at).shape, scan.mask is not None)
    for place, ax in enumerate(axes.flat):
        name, marked = names[place % len(names)], place >= len(names)
        image = scan.cut(scan.volumes[name], "axial", at)
        title = PRINTED[name] + ", segmentation" * marked
        _show(ax, image, scan.window(name), title, scan.aspect("axial"))
        if marked:
            _overlay(ax, scan.cut(scan.mask, "axial", at))
    if scan.mask is not None:
        _class_legend(figure)
    printed = ", ".join(PRINTED[name] for name in names)
    _title(figure, f"{case.id} · {printed} · axial slice {at}", _intensities(case), simulated)
    return figure


@_styled
def montage(case: Case, modality: str, *, count: int = 12, simulated: bool) -> Figure:
    """Axial slices of one modality from the lowest to the highest with tumour (or brain), with the segmentation.

    Args:
        count: slices shown at most, evenly spread.
    """
    scan = _load(case, [modality])
    filled = np.flatnonzero(scan.focus.any(axis=(0, 1)))
    picks = np.unique(np.linspace(filled[0], filled[-1], count).round().astype(int))
    columns = min(4, len(picks))
    shape = scan.cut(scan.focus, "axial", 0).shape
    figure, axes = _panels(-(-len(picks) // columns), columns, shape, scan.mask is not None)
    for ax, at in zip(axes.flat, picks, strict=False):
        image = scan.cut(scan.volumes[modality], "axial", at)
        _show(ax, image, scan.window(modality), f"slice {at}", scan.aspect("axial"))
        if scan.mask is not None:
            _overlay(ax, scan.cut(scan.mask, "axial", at))
    if scan.mask is not None:
        _class_legend(figure)
    headline = f"{case.id} · {PRINTED[modality]} · axial slices {picks[0]} to {picks[-1]}"
    _title(figure, headline, _intensities(case), simulated)
    return figure


def gif(case: Case, path: Path, *, modality: str, step: int = 2, simulated: bool) -> Path:
    """Write an animation through the axial slices with brain, the segmentation beside the plain image.

    Args:
        path: of the GIF, a megabyte or so.
        step: every which slice.
    """
    import imageio.v3 as imageio
    from PIL import Image, ImageDraw, ImageFont

    scan = _load(case, [modality])
    low, high = scan.window(modality)
    colours = np.array([to_rgb(COLOURS[name]) for name in CLASSES])
    name = case.id + " · simulated" * simulated
    font = ImageFont.load_default(11)
    frames = []
    for at in range(scan.box[2].start, scan.box[2].stop, step):
        image = scan.cut(scan.volumes[modality], "axial", at)
        grey = np.round(np.clip((image - low) / (high - low), 0, 1) * 31) / 31  # few greys: a small file
        plain = np.repeat(grey[..., None], 3, axis=2)
        marked = plain.copy()
        if scan.mask is not None:
            classes = scan.cut(scan.mask, "axial", at)
            marked[classes > 0] = 0.5 * plain[classes > 0] + 0.5 * colours[classes[classes > 0]]
        frame = np.pad(np.hstack([plain, marked]), ((34, 0), (0, 0), (0, 0)))
        picture = Image.fromarray(np.round(frame * 255).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        draw.text((4, 2), name, "white", font)
        draw.text((4, 17), f"{PRINTED[modality]} · axial slice {at}", "white", font)
        frames.append(np.asarray(picture))
    how = {"duration": 100, "loop": 0, "comment": f"{name} · {PRINTED[modality]} · axial slices".encode()}
    with whole_file(path, "wb") as file:
        imageio.imwrite(file, frames, extension=".gif", **how)
    return path


@_styled
def planes(case: Case, modality: str, *, simulated: bool) -> Figure:
    """Sagittal, coronal and axial plane through the tumour's centre by nilearn, without and with the segmentation."""
    from nilearn import plotting

    image, mask, centre, window = _nilearn_input(case, modality)
    figure = plt.figure(figsize=(_WIDTH, 4 if mask is None else 7.5), layout="none")
    look = {
        "cut_coords": centre, "radiological": True, "colorbar": False, "black_bg": True,
        "vmin": window[0], "vmax": window[1],
    }  # fmt: skip
    top = (0, 0.04, 1, 0.82) if mask is None else (0, 0.48, 1, 0.435)
    plotting.plot_anat(image, figure=figure, axes=top, **look)
    if mask is not None:
        display = plotting.plot_anat(image, figure=figure, axes=(0, 0.05, 1, 0.42), draw_cross=False, **look)
        colours = ListedColormap([COLOURS[name] for name in CLASSES[1:]])
        display.add_overlay(mask, threshold=0.5, cmap=colours, vmin=1, vmax=3, transparency=0.6)
        _class_legend(figure)
    x, y, z = (f"{value:.0f}" for value in centre)
    headline = f"{case.id} · {PRINTED[modality]} · three planes through x = {x}, y = {y}, z = {z} mm"
    _title(figure, headline, _intensities(case), simulated)
    return figure


def interactive_view(case: Case, modality: str, *, simulated: bool):
    """A viewer to click through in three planes: the last value of a cell shows it, `.save_as_html(path)` keeps it.

    Returns:
        nilearn's view, at half the resolution so that the page stays light. It does not turn its crosshair
        with `radiological=True`, so this is the one figure with the patient's left on the left.
    """
    from nilearn import plotting

    image, mask, centre, _ = _nilearn_input(case, modality)
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


def _nilearn_input(case: Case, modality: str) -> tuple[nib.Nifti1Image, nib.Nifti1Image | None, list[float], tuple]:
    """Image and mask within the brain's box, the tumour's centre in mm, and the window."""
    scan = _load(case, [modality])
    voxels, image = read_image(case.images[modality])
    box = tuple(_around(voxels != 0))
    mask = nib.Nifti1Image(read_mask(case.seg), image.affine) if case.seg else None
    focus = voxels != 0 if mask is None or not np.any(mask.dataobj) else np.asarray(mask.dataobj) > 0
    centre = nib.affines.apply_affine(image.affine, [_fullest(focus, axis) for axis in range(3)])
    crop = None if mask is None else mask.slicer[box]
    return image.slicer[box], crop, [float(value) for value in centre], scan.window(modality)


def _fullest(volume: np.ndarray, axis: int) -> int:
    """Index along `axis` of the slice with most true voxels."""
    return int(volume.sum(axis=tuple({0, 1, 2} - {axis})).argmax())


def viewer_tiles(case: Case, prediction: Path) -> dict[str, object]:
    """A patient's brain for the report's viewer: pictures that a page can carry and a browser can cut in three planes.

    Axial slices lie side by side as tiles, from left to right and top to bottom. Axes run right to left, front to
    back, feet to head, as in every figure here.

    Args:
        case: a labelled patient.
        prediction: its `<case>_seg.nii.gz`.

    Returns:
        `shape`, `spacing` (mm) and `origin` (of the brain's box in the volume), each along X, Y, Z; `columns` of tiles;
        `start`, a voxel of the box in the slices with most tumour; `images`, by modality a lossy WebP of grey values
        between `window()`'s ends; `labels`, a PNG whose grey values are 64 x predicted + 16 x reference class + 8.
    """
    scan = _load(case, tuple(case.images))
    image = read_image(next(iter(case.images.values())))[1]
    predicted = _upright(nib.Nifti1Image(read_mask(prediction), image.affine))[0]
    box = _around(scan.focus | (predicted > 0) | np.any([volume != 0 for volume in scan.volumes.values()], axis=0))
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
        "start": [_fullest(focus, axis) for axis in range(3)],
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


@_styled
def histograms(case: Case, *, simulated: bool) -> Figure:
    """Distribution of the normalised intensities of each tissue, per modality."""
    scan = _load(case, tuple(case.images))
    columns = min(2, len(scan.volumes))
    rows = -(-len(scan.volumes) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(_WIDTH, 3 * rows + 1), sharex=True, squeeze=False)
    bins = np.linspace(-4, 6, 101)
    names = ["brain outside tumour" if case.seg else "brain (no segmentation)", *map(_named, CLASSES[1:])]
    brain = np.any([volume != 0 for volume in scan.volumes.values()], axis=0)
    classes = np.zeros(brain.shape, np.uint8) if scan.mask is None else scan.mask
    for ax, (name, volume) in zip(axes.flat, scan.volumes.items(), strict=False):
        scores = normalise(volume)
        for index, tissue in enumerate(CLASSES):
            values = scores[brain & (classes == index)]
            if values.size:
                heights = np.histogram(values, bins)[0] / values.size / (bins[1] - bins[0])
                ax.stairs(
                    heights, bins, color=COLOURS[tissue], fill=index == 0, alpha=0.35 if index == 0 else 1,
                    linestyle=_DASHES[tissue], linewidth=1.6, label=names[index],
                )  # fmt: skip
        ax.set_title(PRINTED[name])
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    for ax in axes.flat[len(scan.volumes) :]:
        ax.axis("off")
    for ax in axes[-1]:
        ax.set_xlabel("z-score (standard deviations from the brain's mean)")
    figure.supylabel("share of the tissue's voxels", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4)
    detail = "normalised intensity of each tissue; every curve encloses the same area"
    _title(figure, f"{case.id} · {', '.join(PRINTED[name] for name in scan.volumes)}", detail, simulated)
    return figure


# Data set


@_styled
def balance(counts: Mapping[str, Sequence[np.ndarray]], *, simulated: bool) -> Figure:
    """How many patients and slices of each part hold each class, as share and as number.

    Args:
        counts: for each part of the split one array a patient, (slices, 4): voxels of each class per slice of
            the brain's box (`cache.Packed.counts`).
    """
    kinds = ["tumour", *CLASSES[1:]]
    table = {}
    for part, patients in counts.items():
        holds = [np.column_stack([voxels[:, 1:].any(axis=1), voxels[:, 1:] > 0]) for voxels in patients]
        in_patients = np.array([slices.any(axis=0) for slices in holds]).sum(axis=0)
        in_slices = np.concatenate(holds).sum(axis=0)
        table[part] = {"patients": (len(holds), in_patients), "slices": (sum(map(len, holds)), in_slices)}

    figure = plt.figure(figsize=(_WIDTH, 4.2 + 0.3 * len(table)))
    axes = figure.subplots(2, 2, height_ratios=[3, 0.3 * (len(table) + 1)])
    for (ax, below), unit in zip(axes.T, ("patients", "slices"), strict=True):
        width = 0.8 / len(table)
        for place, (part, ink) in enumerate(zip(table, _PART_INK, strict=False)):
            total, numbers = table[part][unit]
            at = np.arange(len(kinds)) + (place - (len(table) - 1) / 2) * width
            ax.bar(at, 100 * numbers / max(total, 1), width * 0.92, color=ink, label=part)
        ax.set_xticks(range(len(kinds)), kinds)
        for label in ax.get_xticklabels()[1:]:
            label.set_bbox({"facecolor": to_rgba(COLOURS[label.get_text()], 0.45), "edgecolor": "none", "pad": 2})
        ax.tick_params(axis="x", length=0, pad=6)
        ax.set_ylim(0, 100 if unit == "patients" else None)
        ax.set_ylabel(f"share of the part's {unit} (%)")
        ax.set_title(unit.capitalize())
        ax.grid(axis="y")
        below.axis("off")
        cells = below.table(
            [[f"{number:,}" for number in (row[unit][0], *row[unit][1])] for row in table.values()],
            rowLabels=list(table), colLabels=["all", *kinds], loc="center", edges="horizontal", cellLoc="right",
            colLoc="right", rowLoc="left", bbox=[0.08, 0, 0.92, 1],
        )  # fmt: skip
        cells.auto_set_font_size(False)
        cells.set_fontsize(9)
        for cell in cells.get_celld().values():
            cell.set_edgecolor("#D0D0D0")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=len(table))
    headline = f"Patients and slices with each class · {', '.join(table)}"
    _title(figure, headline, "slices: axial, within the brain's box; split by patient", simulated)
    return figure


# Training


@_styled
def batch(images, masks, *, modalities: Sequence[str], count: int = 6, simulated: bool) -> Figure:
    """Slices as the network sees them, the segmentation outlined.

    Args:
        images: (batch, channels, Y, X), z-scores; with neighbouring slices as channels, the middle one is shown.
        masks: (batch, Y, X), class indices.
        modalities: names of a slice's channels.
        count: slices shown at most.
    """
    images, masks = _middle(images, len(modalities))[:count], _array(masks)[:count]
    figure, axes = _panels(len(modalities), len(images), images.shape[2:])
    for row, name in enumerate(modalities):
        for column, (image, mask) in enumerate(zip(images, masks, strict=True)):
            _show(axes[row, column], image[row], _Z_WINDOW, PRINTED[name] if column == 0 else "")
            for index, tissue in enumerate(CLASSES[1:], start=1):
                _outline(axes[row, column], mask == index, COLOURS[tissue])
    _class_legend(figure)
    height, width = images.shape[2:]
    headline = f"A training batch · {', '.join(PRINTED[name] for name in modalities)}"
    _title(figure, headline, f"{_z_window()} · {height} × {width} pixels", simulated)
    return figure


@_styled
def augmentation(
    images, masks, augmented, augmented_masks, *, modalities: Sequence[str], count: int = 5, simulated: bool
) -> Figure:
    """The first modality of some slices before (above) and after (below) augmentation; shapes as in `batch`."""
    rows = {"before": (images, masks), "after": (augmented, augmented_masks)}
    rows = {name: (_middle(x, len(modalities))[:count, 0], _array(y)[:count]) for name, (x, y) in rows.items()}
    figure, axes = _panels(2, len(rows["before"][0]), rows["before"][0].shape[1:])
    for row, (name, (pictures, classes)) in enumerate(rows.items()):
        for column, (image, mask) in enumerate(zip(pictures, classes, strict=True)):
            _show(axes[row, column], image, _Z_WINDOW, name if column == 0 else "")
            for index, tissue in enumerate(CLASSES[1:], start=1):
                _outline(axes[row, column], mask == index, COLOURS[tissue])
    _class_legend(figure)
    headline = f"Slices before and after augmentation · {PRINTED[modalities[0]]}"
    _title(figure, headline, _z_window(), simulated)
    return figure


def _z_window() -> str:
    return f"z-scores from {_Z_WINDOW[0]} (black) to {_Z_WINDOW[1]} (white); the grey around the brain is 0"


def _array(values) -> np.ndarray:
    """A tensor of any device, or an array, as an array."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _middle(images, modalities: int) -> np.ndarray:
    """The channels of the middle slice, (batch, modalities, Y, X)."""
    images = _array(images).astype(np.float32)
    first = (images.shape[1] - modalities) // 2
    return images[:, first : first + modalities]


@_styled
def training_curves(history: pd.DataFrame, *, best_epoch: int, run: str, simulated: bool) -> Figure:
    """Loss, validation Dice per region and class, learning rate and speed over the epochs, the best one marked.

    Args:
        history: `history.csv` of the run; a panel whose columns are missing stays empty.
        best_epoch: the one whose weights were kept.
        run: its name.
    """
    figure = plt.figure(figsize=(_WIDTH, 6.2))
    layout = [["loss"] * 2 + ["regions"] * 2 + ["classes"] * 2, ["lr"] * 3 + ["speed"] * 3]
    axes = figure.subplot_mosaic(layout, height_ratios=[2, 1])
    _curve(axes["loss"], history, "train_loss", _INK, "-", "o", "training")
    _curve(axes["loss"], history, "val_loss", _SOFT, "--", "s", "validation")
    for panel, names in (("regions", REGIONS), ("classes", CLASSES[1:])):
        for name in names:
            _curve(axes[panel], history, f"dice_{name}", COLOURS[name], _DASHES[name], _MARKERS[name], name)
        axes[panel].set_ylim(0, 1)
    _curve(axes["lr"], history, "lr", _INK, "-", "o")
    _curve(axes["speed"], history, "slices_per_s", _INK, "-", "o")
    titles = {
        "loss": ("Loss", "cross-entropy + Dice loss"),
        "regions": ("Validation Dice by region", "Dice (0 to 1), brats2020"),
        "classes": ("Validation Dice by class", "Dice (0 to 1), brats2020"),
        "lr": ("Learning rate", "learning rate"),
        "speed": ("Speed", "slices per second"),
    }
    for name, ax in axes.items():
        ax.axvline(best_epoch, color=_SOFT, linewidth=0.8, linestyle=":", zorder=0)
        ax.set_title(titles[name][0])
        ax.set_ylabel(titles[name][1])
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.grid(axis="y")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="best")
    for name in ("lr", "speed"):
        axes[name].set_ylim(0, 1.1 * axes[name].get_ylim()[1])
    epochs = history["epoch"]
    detail = f"epochs {epochs.min()} to {epochs.max()} · dotted line: epoch {best_epoch}, the one kept"
    _title(figure, f"Training of {run}", detail, simulated)
    return figure


def _curve(ax: Axes, history: pd.DataFrame, column: str, colour: str, dash: str, marker: str, label: str = "") -> None:
    if column in history:
        ax.plot(history["epoch"], history[column], color=colour, linestyle=dash, marker=marker, label=label)


# Evaluation


@_styled
def overlays(cases: Sequence[Case], predictions: Path, metrics: Mapping, *, modality: str, simulated: bool) -> Figure:
    """Best, median and worst patient: outlines of prediction and reference in three planes.

    Args:
        cases: the scored patients.
        predictions: folder of `<case>_seg.nii.gz`.
        metrics: `metrics.json`; patients are ranked by their mean Dice of WT, TC and ET.
    """
    scores = metrics["cases"]
    by_id = {case.id: case for case in cases}
    picks = best_median_worst(scores)
    figure = plt.figure(figsize=(_WIDTH, 3.9 * len(picks) + 0.8))
    rows = figure.subfigures(len(picks), 1, squeeze=False)[:, 0]
    for row, (rank, case_id) in zip(rows, picks.items(), strict=True):
        case = by_id[case_id]
        scan = _load(case, [modality])
        image = read_image(case.images[modality])[1]
        predicted = _upright(nib.Nifti1Image(read_mask(predictions / f"{case_id}_seg.nii.gz"), image.affine))[0]
        focus = predicted > 0 if predicted.any() and not np.any(scan.mask) else scan.focus
        box = _cube(focus | (predicted > 0))
        for ax, plane in zip(row.subplots(1, 3), _PLANES, strict=True):
            ax.axis("off")
            at = _fullest(focus, _PLANES[plane])
            picture = scan.cut(scan.volumes[modality], plane, at, box)
            _show(ax, picture, scan.window(modality), f"{plane} slice {at}", scan.aspect(plane))
            for name, members in REGIONS.items():
                for mask, dash in ((scan.mask, "-"), (predicted, _DASHED)):
                    inside = np.isin(scan.cut(mask, plane, at, box), members)
                    _outline(ax, inside, COLOURS[name], dash, 3.2 if name == "TC" else 1.2)  # TC shows below ET
        dice = ", ".join(f"{name} {_number(scores[case_id], name, 'dice'):.2f}" for name in REGIONS)
        row.suptitle(f"{rank}: {case_id} · Dice {dice}", x=0.01, ha="left", fontsize=11)
    handles = [Line2D([], [], color=COLOURS[name], label=_named(name)) for name in REGIONS]
    handles += [
        Line2D([], [], color=_INK, label="reference"),
        Line2D([], [], color=_INK, linestyle=_DASHED, label="prediction"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    headline = f"Prediction against reference · {PRINTED[modality]} · {_tested(len(scores))}"
    detail = "slices with most reference tumour, zoomed to it · patient's right on the left"
    _title(figure, headline, f"{_convention(metrics)} · {detail}", simulated)
    return figure


def _cube(inside: np.ndarray) -> list[slice]:
    """A box of equal sides, as far as the volume allows, around the true voxels, with 15 voxels of margin."""
    ends = [(side.min(), side.max() + 1) for side in np.nonzero(inside)]
    side = max(high - low for low, high in ends) + 30
    middles = [(low + high) // 2 for low, high in ends]
    starts = [max(0, min(at - side // 2, n - side)) for at, n in zip(middles, inside.shape, strict=True)]
    return [slice(start, start + side) for start in starts]


def best_median_worst(scores: Mapping[str, Mapping]) -> dict[str, str]:
    """IDs by rank; of fewer than three patients, as many as there are."""
    ranked = sorted(scores, key=lambda case_id: -_mean_dice(scores[case_id]))
    picks = {"Best": ranked[0], "Median": ranked[len(ranked) // 2], "Worst": ranked[-1]}
    if len(ranked) < 3:
        del picks["Median"]
    return {"Only": ranked[0]} if len(ranked) == 1 else picks


def _convention(metrics: Mapping) -> str:
    """The name of the rule book, without its text."""
    return f"convention {str(metrics.get('convention', 'not stated')).partition(':')[0]}"


def _tested(n: int) -> str:
    return f"{n} test patient{'s' * (n != 1)}"


def _number(scores: Mapping, region: str, metric: str) -> float:
    """One figure of one patient; nan where it is missing."""
    value = scores.get(region, {}).get(metric)
    return float("nan") if value is None else float(value)


def _mean_dice(scores: Mapping) -> float:
    """Mean Dice of WT, TC and ET of one patient."""
    return float(np.mean([_number(scores, region, "dice") for region in REGIONS]))


@_styled
def score_distributions(metrics: Mapping, *, simulated: bool) -> Figure:
    """Dice and HD95 of every test patient, per region: a point a patient, a box over the quartiles.

    Args:
        metrics: `metrics.json` of the run.
    """
    cases = metrics["cases"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(_WIDTH, 4.6))
    for ax, metric in ((left, "dice"), (right, "hd95_mm")):
        for place, region in enumerate(REGIONS):
            values = np.array([_number(scores, region, metric) for scores in cases.values()])
            values = values[~np.isnan(values)]
            ax.boxplot(
                values, positions=[place], widths=0.5, showfliers=False,
                medianprops={"color": _INK, "linewidth": 1.6}, boxprops={"color": _SOFT},
                whiskerprops={"color": _SOFT}, capprops={"color": _SOFT},
            )  # fmt: skip
            spread = np.random.default_rng(0).uniform(-0.17, 0.17, len(values))
            ax.scatter(place + spread, values, 22, COLOURS[region], marker=_MARKERS[region], linewidths=0, zorder=3)
        ax.set_xticks(range(len(REGIONS)), [f"{region}\n{_MEANINGS[region]}" for region in REGIONS])
        ax.tick_params(axis="x", length=0)
        ax.grid(axis="y")
    left.set(ylim=(-0.02, 1.02), ylabel="Dice (0 to 1, higher is better)", title="Dice")
    right.set_yscale("symlog", linthresh=1, linscale=0.4)
    right.set_yticks([0, 1, 3, 10, 30, 100, 373], ["0", "1", "3", "10", "30", "100", "373"])
    right.minorticks_off()
    right.set(ylim=(-0.1, 450), ylabel="HD95 (mm, lower is better)", title="HD95, a percentile of the surface distance")
    detail = f"{_convention(metrics)} · a point is a patient; box: quartiles, line: median"
    _title(figure, f"Scores of {_tested(len(cases))}", detail, simulated)
    return figure


@_styled
def calibration(metrics: Mapping, *, simulated: bool) -> Figure:
    """How often a region is where the network gives it a probability; `metrics` is `metrics.json`."""
    found = metrics["uncertainty"]["calibration"]
    figure, axes = plt.subplots(1, len(REGIONS), figsize=(_WIDTH, 4.3), sharey=True)
    for ax, (region, curve) in zip(axes, found.items(), strict=True):
        ax.plot([0, 1], [0, 1], color=_SOFT, linewidth=0.8, linestyle=":")
        predicted, observed = ([row[name] for row in curve["bins"]] for name in ("predicted", "observed"))
        ax.plot(predicted, observed, color=COLOURS[region], marker=_MARKERS[region], markersize=6)
        error = "no voxel" if curve["ece"] is None else f"calibration error {curve['ece']:.3f}"
        ax.set(title=f"{region} · {error}", xlabel="probability given", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        ax.grid()
    axes[0].set_ylabel("share that is the region")
    detail = (
        "brain voxels given the region with 0.01 or more · dotted: perfect · above: says too little, below: too much"
    )
    _title(figure, f"Calibration on {_tested(len(metrics['uncertainty']['cases']))}", detail, simulated)
    return figure


@_styled
def doubt(case: Packed, soft: np.ndarray, *, modality: str, modalities: Sequence[str], simulated: bool) -> Figure:
    """Where a network is wrong and where it is in doubt, on the slice with most errors.

    Args:
        case: a prepared patient with its labels.
        soft: its probabilities, see `inference.predict`.
        modality: the one of `modalities`, those of the prepared patient, to show below the errors.
    """
    wrong = (soft.argmax(axis=1) != case.labels) & case.brain
    at = int(wrong.sum(axis=(1, 2)).argmax())
    image = case.images[at, list(modalities).index(modality)]
    figure, axes = _panels(1, 3, image.shape)
    _show(axes[0, 0], image, _Z_WINDOW, "reference")
    _overlay(axes[0, 0], case.labels[at])
    _show(axes[0, 1], image, _Z_WINDOW, f"errors: {int(wrong[at].sum()):,} voxels")
    axes[0, 1].imshow(np.where(wrong[at, ..., None], to_rgba(_ERROR), 0))
    shown = axes[0, 2].imshow(entropy(np.moveaxis(soft[at], 0, -1)), cmap="magma", vmin=0, vmax=1)
    axes[0, 2].set_title("entropy: 0 sure, 1 all classes alike")
    figure.colorbar(shown, ax=axes[0, 2], shrink=0.8)
    _class_legend(figure)
    headline = f"{case.id} · errors and doubt · {PRINTED[modality]} · axial slice {case.origin[0] + at}"
    _title(figure, headline, f"the slice with most errors · {_z_window()}", simulated)
    return figure


@_styled
def patient_dice(metrics: Mapping, *, simulated: bool) -> Figure:
    """Dice of WT, TC and ET of up to `_MOST` patients, the worst at the bottom; `metrics` is `metrics.json`."""
    cases = metrics["cases"]
    ranked = sorted(cases, key=lambda case_id: _mean_dice(cases[case_id]))[:_MOST]
    figure, ax = plt.subplots(figsize=(_WIDTH, 1.9 + 0.24 * len(ranked)))
    for region in REGIONS:
        values = [_number(cases[case_id], region, "dice") for case_id in ranked]
        ax.plot(
            values, range(len(ranked)), linestyle="none", marker=_MARKERS[region], color=COLOURS[region], markersize=6,
            label=_named(region),
        )  # fmt: skip
    ax.set_yticks(range(len(ranked)), ranked)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(ranked) - 0.4), xlabel="Dice (0 to 1, higher is better)")
    ax.grid()
    figure.legend(loc="outside lower left", ncols=len(REGIONS))
    detail = f"{_convention(metrics)} · ordered by the mean of the three regions"
    lowest = f"the {len(ranked)} lowest of " * (len(ranked) < len(cases))
    _title(figure, f"Dice of {lowest}{_tested(len(cases))}", detail, simulated)
    return figure


@_styled
def volume_agreement(metrics: Mapping, *, simulated: bool) -> Figure:
    """Predicted minus reference volume over the mean of the two, per region, a point a patient.

    The lines are the mean difference and the limits of agreement, 1.96 standard deviations to either side of it
    (Bland and Altman, Lancet 327, 1986). `metrics` is `metrics.json`.
    """
    cases = metrics["cases"]
    figure, axes = plt.subplots(1, len(REGIONS), figsize=(_WIDTH, 3.9))
    for ax, region in zip(axes, REGIONS, strict=True):
        predicted, true = (
            np.array([_number(scores, region, metric) for scores in cases.values()])
            for metric in ("volume_ml", "volume_ml_truth")
        )
        difference = predicted - true
        style = {"color": COLOURS[region], "marker": _MARKERS[region], "markersize": 6}
        ax.plot((predicted + true) / 2, difference, linestyle="none", **style)
        mean = np.nanmean(difference)
        spread = 1.96 * np.nanstd(difference, ddof=1) if len(cases) > 1 else 0
        lines = {mean: "-"} | ({mean - spread: "--", mean + spread: "--"} if len(cases) > 1 else {})
        for at, dash in lines.items():
            ax.axhline(at, color=_INK, linewidth=1, linestyle=dash)
            ax.annotate(
                f"{at:+.1f}", (1, at), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", fontsize=9,
            )  # fmt: skip
        ax.axhline(0, color=_SOFT, linewidth=0.8, linestyle=":")
        ax.margins(x=0.12, y=0.15)
        ax.set(title=_named(region), xlabel="mean of the two volumes (ml)")
        ax.grid(axis="y")
    axes[0].set_ylabel("predicted minus reference (ml)")
    detail = "a point is a patient · line: mean difference, dashed: limits of agreement (1.96 standard deviations)"
    _title(figure, f"Volume agreement of {_tested(len(cases))}", detail, simulated)
    return figure


@_styled
def comparison(
    histories: Mapping[str, pd.DataFrame], metrics: Mapping[str, Mapping], *, headline: str, simulated: bool
) -> Figure:
    """Trainings side by side: validation Dice over training time, and test Dice with its 95 % interval.

    Args:
        histories: `history.csv` of each run by name; `seconds` counts from the start of training.
        metrics: `metrics.json` of each run that was scored, by the same names.
        headline: what they are, or the question that they answer.
    """
    end_s = max(history["seconds"].max() for history in histories.values())
    curves = any(len(history) > 1 for history in histories.values())  # of one epoch each there is nothing to draw
    heights = [3.6] * curves + [0.9 + 0.63 * len(histories)]
    size = (_WIDTH, sum(heights) + 0.8 * (not curves))
    figure, axes = plt.subplots(len(heights), 3, figsize=size, height_ratios=heights, sharey="row", squeeze=False)
    dashes, markers = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P", "X")
    for column, region in enumerate(REGIONS):
        above, below = axes[0, column], axes[-1, column]
        for place, (name, history) in enumerate(histories.items()):
            style = {"color": COLOURS[region], "marker": markers[place % 7]}
            if curves and f"dice_{region}" in history:
                above.plot(history["seconds"], history[f"dice_{region}"], linestyle=dashes[place % 4], **style)
            dice = metrics.get(name, {}).get("summary", {}).get(region, {}).get("dice", {})
            if dice.get("mean") is not None:
                mean = dice["mean"]
                below.plot(dice.get("ci95") or [mean, mean], [place, place], color=COLOURS[region], linewidth=2)
                below.plot(mean, place, markersize=7, **style)
                side = "left" if mean < 0.1 else "center"  # clear of the axis
                below.annotate(f"{mean:.3f}", (mean, place), (0, 6), textcoords="offset points", ha=side)
        above.set_title(_named(region))
        if curves:
            above.set(xlabel="training time (s)", xlim=(0, 1.05 * end_s), ylim=(-0.02, 1.02))
            above.grid(axis="y")
        below.set(xlabel="test Dice, mean and 95 % interval", xlim=(-0.02, 1.02), yticks=range(len(histories)))
        below.set_yticklabels(list(histories))
        below.grid(axis="x")
    axes[-1, 0].set_ylim(len(histories) - 0.4, -0.6)
    if curves:
        axes[0, 0].set_ylabel("validation Dice (0 to 1)")
        handles = [
            Line2D([], [], color=_INK, linestyle=dashes[place % 4], marker=markers[place % 7], label=name)
            for place, name in enumerate(histories)
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=4)
    conventions = sorted({_convention(found) for found in metrics.values()})
    what = "validation Dice by epoch" if curves else "an epoch or less of training each"
    detail = " · ".join([", ".join(histories), what, *conventions])
    _title(figure, headline, detail, simulated)
    return figure


# Parts of a split


@_styled
def strata(patients: pd.DataFrame, *, simulated: bool) -> Figure:
    """How alike the parts of a split are in grade and tumour size: shares of their patients and of their slices.

    Args:
        patients: a row a patient: `part`, `grade` (None where unknown), `tumour_ml` (whole tumour, ml), and `slices`,
            its axial slices with tumour.
    """
    third = (patients["tumour_ml"].rank(method="first") - 1) * 3 // len(patients)
    spans = patients["tumour_ml"].groupby(third).agg(["min", "max"])
    sizes = {k: f"{span['min']:,.0f} to {span['max']:,.0f} ml" for k, span in spans.iterrows()}
    kinds = {"Grade": patients["grade"].fillna("unknown"), "Whole tumour": third}
    parts = list(patients["part"].unique())
    figure = plt.figure(figsize=(_WIDTH, 6))
    axes = figure.subplots(2, 2, sharey="row")
    for row, (name, kind) in zip(axes, kinds.items(), strict=True):
        for ax, unit in zip(row, ("patients", "slices with tumour"), strict=True):
            weights = patients["slices"] if unit != "patients" else 1
            table = patients.assign(kind=kind, n=weights).pivot_table(
                index="kind", columns="part", values="n", aggfunc="sum", fill_value=0
            )
            for place, (part, ink) in enumerate(zip(parts, _PART_INK, strict=False)):
                at = np.arange(len(table)) + (place - (len(parts) - 1) / 2) * 0.8 / len(parts)
                shares = 100 * table[part] / max(table[part].sum(), 1)
                bars = ax.bar(at, shares, 0.74 / len(parts), color=ink, label=part)
                ax.bar_label(bars, [f"{n:,}" for n in table[part]], fontsize=8, color=_SOFT)
            ax.set_xticks(range(len(table)), [sizes.get(key, key) for key in table.index])
            ax.tick_params(axis="x", length=0)
            ax.margins(y=0.12)
            ax.set_title(f"{name}, {unit}")
            ax.grid(axis="y")
        row[0].set_ylabel("share of the part (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=len(parts))
    detail = "numbers above the bars: how many; sizes are thirds of all patients, by the reference segmentation"
    _title(figure, f"Patients and slices by grade and tumour size · {', '.join(parts)}", detail, simulated)
    return figure
