"""The style of all figures."""

import functools
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from brats_helpers.files import read_json, whole_file, write_json
from brats_helpers.labels import CLASSES, COLOURS
from brats_helpers.runs import FIGURE_REGISTER

DASHES = {"background": "-", "NCR": "-.", "ED": "--", "ET": "-", "WT": "--", "TC": "-."}
MARKERS = {"background": ".", "NCR": "^", "ED": "s", "ET": "o", "WT": "s", "TC": "^"}
MEANINGS = {
    "NCR": "necrotic and non-enhancing core",
    "ED": "oedema",
    "ET": "enhancing tumour",
    "WT": "whole tumour",
    "TC": "tumour core",
}
PRINTED = {"flair": "FLAIR", "t1": "T1", "t1ce": "T1ce", "t2": "T2"}
"""The modalities as people write them."""
INK, SOFT = "#222222", "#696969"
ERROR = "#E6002D"
DASHED = (0, (2.5, 1.5))
PART_INK = ("#2B2B2B", "#808080", "#C4C4C4")  # train, val, test; and runs side by side
WIDTH = 10.0  # inches; 1,000 pixels in a notebook
MOST = 60  # most patients that a figure names
PERCENTILES = (1, 99.5)
Z_WINDOW = (-2.5, 3.5)
_STYLE = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a patient's name is a `$`
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
}


def styled(draw):
    """Draw in the common style, and close the figure in pyplot, or a notebook would show it twice."""

    @functools.wraps(draw)
    def styled(*args, **kwargs) -> Figure:
        with plt.rc_context(_STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # the layout needs the style too
        plt.close(figure)
        return figure

    return styled


def save_figure(figure: Figure, path: Path) -> Figure:
    """Write a figure as PNG, register it, and return it to be shown.

    Its title is stored in the file's metadata, as the report's alternative text.
    """
    with whole_file(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Title": figure.get_label()})
    register(path)
    return figure


def register(path: Path) -> None:
    """Add a figure to the register of its folder."""
    place = path.with_name(FIGURE_REGISTER)
    write_json(place, read_json(place, {}) | {path.name: stored_title(path)})


def stored_title(path: Path) -> str:
    """The title that `save_figure` or `gif` stored in an image; raises `OSError` for what is no image."""
    with Image.open(path) as image:
        image.load()
        return image.info.get("Title") or image.info.get("comment", b"").decode()


def title(figure: Figure, headline: str, detail: str, simulated: bool) -> None:
    """Put a headline and a line of detail above the figure. The headline says if the patients are simulated."""
    points = 72 * figure.get_figheight()
    headline += " · simulated" * simulated
    figure.set_label(f"{headline} · {detail}")
    y = None if figure.get_layout_engine() else 1 - 3 / points
    figure.suptitle(f"{headline}\n", x=0.01, y=y, ha="left", fontsize=12, weight="bold", linespacing=1.4)
    figure.text(0.01, 1 - 22 / points, detail, va="top", fontsize=10, color=SOFT)  # on the headline's empty line


def named(name: str) -> str:
    """A class or region with its meaning."""
    return f"{name} {MEANINGS[name]}"


def panels(rows: int, columns: int, shape: tuple[float, float], legend: bool = True) -> tuple[Figure, np.ndarray]:
    """A grid of black panels for images of `shape` (height, width), as wide as a notebook."""
    height = (WIDTH / max(columns, 3) - 0.08) * shape[0] / shape[1] + 0.3
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, rows * height + 0.55 + 0.3 * legend), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    return figure, axes


def show(ax: Axes, image: np.ndarray, window: tuple[float, float], title: str = "", aspect: float = 1) -> None:
    ax.imshow(image, vmin=window[0], vmax=window[1], aspect=aspect)
    ax.set_title(title)


def overlay(ax: Axes, classes: np.ndarray) -> None:
    """Each class as a translucent fill with an outline in its colour; a shared border has the inner one's."""
    fill = np.zeros((*classes.shape, 4))
    for name in ("ED", "NCR", "ET"):
        index = CLASSES.index(name)
        fill[classes == index] = to_rgba(COLOURS[name], 0.35)
        outline(ax, classes == index, COLOURS[name])
    ax.imshow(fill, aspect=ax.get_aspect())


def outline(ax: Axes, inside: np.ndarray, colour: str, dash="-", width: float = 1.1) -> None:
    if inside.any():
        ax.contour(inside.astype(float), [0.5], colors=[colour], linewidths=width, linestyles=[dash])


def class_legend(figure: Figure) -> None:
    patches = [
        Patch(facecolor=to_rgba(COLOURS[name], 0.35), edgecolor=COLOURS[name], label=named(name))
        for name in CLASSES[1:]
    ]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches))


def z_window() -> str:
    return f"z-scores from {Z_WINDOW[0]} (black) to {Z_WINDOW[1]} (white); the grey around the brain is 0"


def array(values) -> np.ndarray:
    """A tensor of any device, or an array, as an array."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def convention(metrics: Mapping) -> str:
    """The name of the scoring rule, without its description."""
    return f"convention {str(metrics.get('convention', 'not stated')).partition(':')[0]}"
