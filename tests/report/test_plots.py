"""Every figure: what it shows, in which colours, under which title."""

import html
import io
import re
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb, to_rgba
from PIL import Image

from brats_helpers.data.cache import pack
from brats_helpers.data.cases import Case, find_cases
from brats_helpers.data.nifti import read_image, read_mask, write_mask
from brats_helpers.report import plots
from brats_helpers.runs import Run

DICE = {"P_1": (0.9, 0.8, 0.7), "P_2": (0.6, 0.5, 0.4), "P_3": (0.8, 0.7, 0.6)}


@pytest.fixture(scope="module")
def cases(tiny_patients):
    return find_cases(tiny_patients)


@pytest.fixture(scope="module")
def case(cases):
    return cases[0]


@pytest.fixture
def metrics():
    scores = {
        case_id: {
            name: {"dice": value, "hd95_mm": 10 * (1 - value)}
            for name, value in zip(("WT", "TC", "ET"), dice, strict=True)
        }
        for case_id, dice in DICE.items()
    }
    summary = {"WT": {"dice": {"mean": 0.767, "ci95": [0.6, 0.9]}}, "ET": {"dice": {"mean": 0.567}}}
    return {"convention": "brats2020: the rules in full", "simulated": True, "cases": scores, "summary": summary}


@pytest.fixture
def history():
    columns = {f"dice_{name}": [0.1, 0.5, 0.4] for name in ("NCR", "ED", "ET", "WT", "TC")}
    losses = {"train_loss": [1.2, 0.8, 0.6], "val_loss": [1.1, 0.9, 1.0]}
    return pd.DataFrame(
        {"epoch": [1, 2, 3], "lr": 1e-3, "slices_per_s": 90.0, "seconds": [5, 10, 15]} | losses | columns
    )


def panels(figure):
    return {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_title(loc="left")}


def everything_said(figure):
    return " ".join(text.get_text() for text in figure.findobj(plt.Text))


def pixel(figure, ax, column, row):
    """The colour on screen of an image's pixel, 0 to 255."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    screen = np.asarray(canvas.buffer_rgba())
    x, y = ax.transData.transform((column, row))
    return screen[int(screen.shape[0] - y), int(x), :3].astype(float)


def inside(mask, index):
    """A voxel of a class, (column, row), whose neighbours are of that class too, so that no outline runs over it."""
    same = mask == index
    core = same.copy()
    for axis in (0, 1):
        core &= np.roll(same, 1, axis) & np.roll(same, -1, axis)
    row, column = np.argwhere(core)[0]
    return column, row


def test_overlay_has_the_colours_of_the_legend(case):
    figure = plots.modalities(case, simulated=True)
    plain, marked = panels(figure)["T1ce"], panels(figure)["T1ce, segmentation"]
    at = int((read_mask(case.seg, case.numbering) > 0).sum(axis=(0, 1)).argmax())
    assert f"{case.id} · FLAIR, T1, T1ce, T2 · axial slice {at} · simulated" in everything_said(figure)
    assert "arbitrary units" in everything_said(figure)

    # Where the brain's box begins is read off the picture shown; X runs right, Y down.
    volume, mask = read_image(case.images["t1ce"])[0][:, :, at], read_mask(case.seg, case.numbering)[:, :, at]
    shown = plain.images[0].get_array()
    x, y = next(
        (x, y)
        for x in range(volume.shape[0] - shown.shape[1] + 1)
        for y in range(volume.shape[1] - shown.shape[0] + 1)
        if np.array_equal(volume[x : x + shown.shape[1], y : y + shown.shape[0]].T, shown)
    )
    mask = mask[x : x + shown.shape[1], y : y + shown.shape[0]].T
    patches = {patch.get_label().split()[0]: patch for patch in figure.legends[0].get_patches()}
    assert list(patches) == ["NCR", "ED", "ET"]
    for index, name in ((2, "ED"), (3, "ET")):
        place = inside(mask, index)
        *colour, alpha = patches[name].get_facecolor()
        assert colour == pytest.approx(to_rgb(plots.COLOURS[name]))
        expected = alpha * 255 * np.array(colour) + (1 - alpha) * pixel(figure, plain, *place)
        assert pixel(figure, marked, *place) == pytest.approx(expected, abs=6)


def test_one_or_two_modalities_and_no_segmentation(case, tiny_patients):
    two = Case(case.id, {name: case.images[name] for name in ("flair", "t1ce")}, case.seg)
    assert list(panels(plots.modalities(two, simulated=False))) == [
        "FLAIR", "T1ce", "FLAIR, segmentation", "T1ce, segmentation",
    ]  # fmt: skip
    bare = plots.modalities(Case(case.id, two.images), simulated=False)
    assert list(panels(bare)) == ["FLAIR", "T1ce"]
    assert "no segmentation" in everything_said(bare) and "simulated" not in everything_said(bare)
    assert not bare.legends


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PSR"])
def test_anterior_is_up_and_the_patients_right_on_the_left(tmp_path, axes):
    voxels = np.zeros((20, 30, 10), np.int16)  # towards left, posterior, superior, as BraTS files lie
    voxels[4:16, 4:26, 1:9] = 100
    voxels[5, 6, 5] = 900  # right, anterior
    image = nib.Nifti1Image(voxels, np.diag([-1.0, -1.0, 1.0, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(axes)))
    nib.save(image.as_reoriented(turn), tmp_path / "Mark_flair.nii.gz")
    (found,) = find_cases(tmp_path, ["flair"])
    shown = panels(plots.montage(found, "flair", count=8, simulated=False))["slice 5"].images[0].get_array()
    assert np.argwhere(shown == 900).tolist() == [[6, 5]]  # the box begins at 0: four voxels of margin
    assert shown.shape == (30, 20)


def test_montage_shows_the_slices_it_names(case):
    figure = plots.montage(case, "t2", count=3, simulated=True)
    depth = np.flatnonzero((read_mask(case.seg, case.numbering) > 0).any(axis=(0, 1)))
    expected = [depth[0], round((depth[0] + depth[-1]) / 2), depth[-1]]
    assert list(panels(figure)) == [f"slice {at}" for at in expected]
    volume = read_image(case.images["t2"])[0]
    for at in expected:
        shown = panels(figure)[f"slice {at}"].images[0].get_array()
        assert shown.sum() == volume[:, :, at].sum()
    assert f"{case.id} · T2 · axial slices {depth[0]} to {depth[-1]} · simulated" in everything_said(figure)


def test_gif_has_a_frame_for_every_step_through_the_brain(case, tmp_path):
    path = plots.gif(case, tmp_path / "figures" / "scroll.gif", modality="flair", step=3, simulated=True)
    brain = np.flatnonzero((read_image(case.images["flair"])[0] != 0).any(axis=(0, 1)))
    first, last = max(brain[0] - 4, 0), min(brain[-1] + 4, 19)
    with Image.open(path) as movie:
        assert movie.n_frames == len(range(first, last + 1, 3))
        assert movie.info["comment"].decode() == f"{case.id} · simulated · FLAIR · axial slices"
        movie.seek(movie.n_frames // 2)
        left, right = np.split(np.asarray(movie.convert("RGB"))[34:], 2, axis=1)
    differs = (left != right).any(axis=2)
    assert (left[..., 0] == left[..., 1]).all() and differs.any()  # grey on the left, colours on the right
    assert set(map(tuple, np.argwhere(differs))) == set(map(tuple, np.argwhere(right.max(axis=2) != right.min(axis=2))))


def test_full_size_gif_stays_small(real_patients, tmp_path):
    (case,) = find_cases(real_patients / "brats_2013_pat0003_1", ["flair"])
    assert plots.gif(case, tmp_path / "a.gif", modality="flair", simulated=False).stat().st_size < 2e6


def test_planes_name_the_tumours_centre_in_mm(case):
    figure = plots.planes(case, "flair", simulated=True)
    tumour = read_mask(case.seg, case.numbering) > 0
    i, j, k = (tumour.sum(axis=axes).argmax() for axes in ((1, 2), (0, 2), (0, 1)))
    x, y, z = -i, 55 - j, k  # the affine of the tiny patients
    assert f"{case.id} · FLAIR · three planes through x = {x}, y = {y}, z = {z} mm" in everything_said(figure)
    assert everything_said(figure).count(f"z={z}") == 2 and "simulated" in everything_said(figure)


def test_interactive_view_loads_nothing_and_escapes_names(case):
    hostile = Case("<img src=x onerror=alert(1)>", case.images, case.seg)
    view = plots.interactive_view(hostile, "t1", simulated=True)
    assert "&lt;img src=x onerror=alert(1)&gt; · T1 · simulated" in view.html
    assert "<img src=x" not in view.html
    assert 'href="http' not in view.html and 'src="http' not in view.html
    assert len(view.html) < 1e6
    plots.interactive_view(Case(case.id, case.images), "t1", simulated=False)


def test_prediction_and_reference_are_toggled_at_one_place(case, tmp_path):
    prediction = tmp_path / f"{case.id}_seg.nii.gz"
    mask = nib.load(case.seg)
    moved = np.roll(np.asarray(mask.dataobj), 4, axis=0)  # a tumour elsewhere must not move the planes
    nib.save(nib.Nifti1Image(moved, mask.affine), prediction)
    page = plots.toggled_view(case, prediction, "t1ce", numbering=case.numbering, simulated=True).data
    frames = [html.unescape(frame) for frame in re.findall(r'<iframe class="\w+".*?</iframe>', page, re.DOTALL)]
    assert [re.search(r'class="(\w+)"', frame)[1] for frame in frames] == ["prediction", "reference"]
    starts = [re.findall(r'"numSlice": (\{.*?\})', frame) for frame in frames]
    assert len(starts[0]) == 1 and starts[0] == starts[1]
    sprites = [re.findall(r'src="(data:image/png;base64,[^"]+)"', frame) for frame in frames]
    (one, its_tumour), (other, own_tumour) = sprites  # the image and the overlay, whatever nilearn calls them
    assert one == other and its_tumour != own_tumour
    assert 'href="http' not in page and 'src="http' not in page and len(page) < 2e6


def test_histograms_are_of_z_scores_per_tissue(case):
    figure = plots.histograms(case, simulated=True)
    volume, mask = read_image(case.images["t1ce"])[0].astype(float), read_mask(case.seg, case.numbering)
    scores = (volume - volume[volume != 0].mean()) / volume[volume != 0].std()
    curves = {patch.get_label().split()[0]: patch.get_data() for patch in panels(figure)["T1ce"].patches}
    assert list(curves) == ["brain", "NCR", "ED", "ET"]
    for name, tissue in {"NCR": mask == 1, "ED": mask == 2, "brain": (mask == 0) & (volume != 0)}.items():
        heights, edges, _ = curves[name]
        assert np.sum(heights * np.diff(edges)) == pytest.approx(1, abs=0.01)
        middles = (edges[:-1] + edges[1:]) / 2
        assert np.average(middles, weights=heights) == pytest.approx(scores[tissue].mean(), abs=0.05)
    assert "z-score" in everything_said(figure) and "simulated" in everything_said(figure)


def test_balance_counts_patients_and_slices():
    first = np.array([[9, 0, 0, 0], [9, 1, 5, 0], [9, 0, 5, 2]])  # NCR in one slice, ED in two, ET in one
    second = np.array([[9, 0, 3, 0], [9, 0, 0, 0]])  # ED alone
    figure = plots.balance({"train": [first, second], "val": [second]}, simulated=True)
    tables = [ax.tables[0] for ax in figure.axes if ax.tables]
    read = [[[table[row, k].get_text().get_text() for k in range(-1, 4)] for row in range(2)] for table in tables]
    assert read[0] == [["train: 2", "2", "1", "2", "1"], ["val: 1", "1", "0", "1", "0"]]
    assert read[1] == [["train: 5", "3", "1", "3", "1"], ["val: 2", "1", "0", "1", "0"]]
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [100, 50, 100, 50, 100, 0, 100, 0]  # % of the patients, train then val
    assert "simulated" in everything_said(figure)


def test_training_curves_show_the_history_and_the_kept_epoch(history):
    figure = plots.training_curves(history, best_epoch=2, run="demo", simulated=True)
    regions = panels(figure)["Validation Dice by region"]
    lines = {line.get_label(): line for line in regions.lines}
    assert lines["WT"].get_ydata().tolist() == [0.1, 0.5, 0.4] and lines["WT"].get_color() == plots.COLOURS["WT"]
    for ax in panels(figure).values():
        assert [2, 2] in [list(line.get_xdata()) for line in ax.lines]
    assert "Training of demo · simulated" in everything_said(figure)
    plots.training_curves(history[["epoch", "train_loss"]], best_epoch=1, run="demo", simulated=False)


def test_curves_grow_after_every_epoch_where_a_person_watches(history, tmp_path, monkeypatch):
    run, shown = Run(tmp_path), []
    run.record(simulated=True)
    assert plots.live_curves(run) is None

    def display(figure, display_id):
        shown.append(figure)
        return SimpleNamespace(update=shown.append)

    monkeypatch.setattr("brats_helpers.report.plots.training.watched", lambda: True)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr("IPython.display.display", display)
    rows, follow = history.to_dict("records"), plots.live_curves(run)
    for epochs in (1, 2, 3):
        follow(rows[:epochs])
    said = [everything_said(figure) for figure in shown]
    assert len(said) == 3 and "epochs 1 to 1" in said[0]
    assert "epochs 1 to 3 · dotted line: epoch 2, the one kept" in said[2]


def test_batch_shows_the_middle_slice_of_a_stack():
    images = torch.zeros(2, 6, 32, 32)  # two modalities, three slices: channels 2 and 3 are the middle one
    images[:, 2], images[:, 3] = 1.0, 2.0
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[0, 8:20, 8:20] = 3
    figure = plots.batch(images, masks, modalities=["flair", "t1ce"], count=2, simulated=True)
    shown = [ax.images[0].get_array() for ax in figure.axes]
    assert [array.mean() for array in shown] == [1, 1, 2, 2]
    outlined = [[to_rgba(line.get_edgecolor()[0]) for line in ax.collections] for ax in figure.axes]
    assert outlined == [[to_rgba(plots.COLOURS["ET"])], [], [to_rgba(plots.COLOURS["ET"])], []]
    assert "z-scores" in everything_said(figure) and "32 × 32 pixels" in everything_said(figure)


def test_augmentation_shows_before_above_after():
    images, masks = np.zeros((3, 1, 8, 8)), np.zeros((3, 8, 8))
    figure = plots.augmentation(images, masks, images + 1, masks, modalities=["t2"], count=2, simulated=True)
    assert [ax.images[0].get_array().mean() for ax in figure.axes] == [0, 0, 1, 1]
    assert "T2 · simulated" in everything_said(figure)


def test_overlays_of_best_median_and_worst(cases, tmp_path, metrics):
    for case in cases[:3]:
        write_mask(
            tmp_path / f"{case.id}_seg.nii.gz",
            np.roll(read_mask(case.seg, case.numbering), 2, 0),
            read_image(case.seg)[1],
        )
    scores = {case.id: metrics["cases"][name] for case, name in zip(cases, DICE, strict=False)}
    figure = plots.overlays(cases, tmp_path, metrics | {"cases": scores}, modality="t1ce", simulated=True)
    said = everything_said(figure)
    for rank, case, dice in (("Best", 0, "0.90"), ("Median", 2, "0.80"), ("Worst", 1, "0.60")):
        assert f"{rank}: {cases[case].id} · Dice WT {dice}" in said
    assert "T1ce · 3 test patients · simulated" in said and "convention brats2020" in said

    first = panels(figure.subfigs[0])
    assert [title.split()[0] for title in first] == ["axial", "coronal", "sagittal"]
    whole = [
        outline
        for outline in next(iter(first.values())).collections
        if to_rgba(outline.get_edgecolor()[0]) == to_rgba(plots.COLOURS["WT"])
    ]
    reference, prediction = whole
    assert reference.get_linestyle()[0][1] is None and prediction.get_linestyle()[0][1] is not None
    moved = prediction.get_paths()[0].vertices[:, 0].min() - reference.get_paths()[0].vertices[:, 0].min()
    assert moved == pytest.approx(2)


def test_overlays_of_one_patient_without_tumour(tmp_path, case):
    empty = np.zeros_like(read_mask(case.seg, case.numbering))
    for folder in (tmp_path, tmp_path / "truth"):
        folder.mkdir(exist_ok=True)
        write_mask(folder / f"{case.id}_seg.nii.gz", empty, read_image(case.seg)[1])
    healthy = Case(case.id, case.images, tmp_path / "truth" / f"{case.id}_seg.nii.gz")
    figure = plots.overlays([healthy], tmp_path, {"cases": {case.id: {}}}, modality="t1", simulated=True)
    assert f"Only: {case.id} · Dice WT nan" in everything_said(figure)


def test_score_distributions_have_a_point_a_patient(metrics):
    metrics["cases"]["P_2"]["ET"]["hd95_mm"] = None
    figure = plots.score_distributions(metrics, simulated=True)
    points = {
        title: [ax.collections[place].get_offsets()[:, 1].tolist() for place in range(3)]
        for title, ax in panels(figure).items()
    }
    assert points["Dice"] == [[0.9, 0.6, 0.8], [0.8, 0.5, 0.7], [0.7, 0.4, 0.6]]
    assert points["HD95, a percentile of the surface distance"][2] == pytest.approx([3, 4])
    said = everything_said(figure)
    assert "Scores of 3 test patients · simulated" in said and "brats2020" in said and "HD95 (mm" in said


def test_calibration_shows_every_bin_and_each_regions_error():
    rows = [{"low": 0.2, "high": 0.3, "voxels": 9, "predicted": 0.25, "observed": 0.4}]
    curves = {"WT": {"ece": 0.15, "bins": rows}, "TC": {"ece": 0.15, "bins": rows}, "ET": {"ece": None, "bins": []}}
    figure = plots.calibration({"uncertainty": {"cases": {"P_1": {}}, "calibration": curves}}, simulated=True)
    assert list(panels(figure)) == ["WT · calibration error 0.150", "TC · calibration error 0.150", "ET · no voxel"]
    assert figure.axes[0].lines[1].get_xydata().tolist() == [[0.25, 0.4]]
    assert "Calibration on 1 test patient · simulated" in everything_said(figure)


def test_uncertainty_is_shown_on_the_slice_with_the_most_errors(case):
    packed = pack(case)
    soft = np.full((len(packed.labels), 4, *packed.labels.shape[1:]), 0.02, np.float32)
    np.put_along_axis(soft, packed.labels[:, None].astype(np.int64), 0.94, axis=1)  # sure, and right
    at = int(packed.counts[:, 3].argmax())
    row, column = np.argwhere(packed.labels[at] == 3)[0]
    soft[at, :, row, column] = (0.26, 0.25, 0.25, 0.24)  # in doubt, and wrong
    figure = plots.doubt(packed, soft, modality="t1ce", modalities=list(case.images), simulated=False)
    shown = panels(figure)
    assert list(shown)[:2] == ["reference", "before post-processing"]
    assert f"{case.id} · errors and uncertainty · T1ce · axial slice {packed.origin[0] + at}" in everything_said(figure)
    marked = shown["errors (red): 1 voxels"].images[1].get_array()
    assert np.argwhere(marked[..., 3]).tolist() == [[row, column]]
    heat = shown["uncertainty (entropy)"].images[0].get_array()
    assert np.unravel_index(heat.argmax(), heat.shape) == (row, column) and heat.max() > 0.99
    # -(0.94 log 0.94 + 3 * 0.02 log 0.02) / log 4
    assert heat.min() == pytest.approx(0.2113, abs=1e-3)


def test_patients_are_ordered_and_their_names_are_text(metrics):
    metrics["cases"]["$a_1$ & <b>"] = metrics["cases"].pop("P_1")
    figure = plots.patient_dice(metrics, simulated=True)
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["P_2", "P_3", "$a_1$ & <b>"]
    assert not any(label.get_parse_math() for label in labels)
    assert figure.axes[0].lines[0].get_xdata() == pytest.approx([0.6, 0.8, 0.9])


def test_comparison_over_time_with_intervals(history, metrics):
    arms = {"frozen": history, "tuned": history}
    figure = plots.comparison(arms, {"tuned": metrics}, headline="Frozen?", simulated=True)
    above = panels(figure)["WT whole tumour"]
    assert [line.get_xdata().tolist() for line in above.lines] == [[5, 10, 15]] * 2
    assert len({line.get_linestyle() for line in above.lines}) == 2
    below = figure.axes[3]
    assert [list(line.get_xdata()) for line in below.lines] == [[0.6, 0.9], [0.767]]
    assert [label.get_text() for label in below.get_yticklabels()] == ["frozen", "tuned"]
    said = everything_said(figure)
    assert "Frozen? · simulated" in said and "convention brats2020" in said and "the rules in full" not in said


def test_saved_figure_carries_its_title_and_is_shown_once(tmp_path, metrics):
    figure = plots.patient_dice(metrics, simulated=True)
    assert plots.save_figure(figure, tmp_path / "figures" / "03_patients.png") is figure
    with Image.open(tmp_path / "figures" / "03_patients.png") as image:
        assert image.info["Title"].startswith("Dice of 3 test patients · simulated · convention brats2020")
        assert image.width == 1500
    assert plt.get_fignums() == []  # pyplot would show it a second time


# Machado, Oliveira and Fernandes 2009: what people without the red or the green receptor see, in linear RGB.
VISION = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("names", [("NCR", "ED", "ET"), ("WT", "TC", "ET")])
def test_colours_differ_for_colour_blind_eyes(vision, names):
    def lab(colour):
        linear = ((np.array(to_rgb(colour)) + 0.055) / 1.055) ** 2.4
        seen = np.clip(VISION[vision] @ linear, 0, 1)
        xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]] @ seen
        x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    for one, other in combinations(names, 2):
        assert np.linalg.norm(lab(plots.COLOURS[one]) - lab(plots.COLOURS[other])) > 20  # 2.3 is just noticeable


def test_importing_leaves_backend_and_nilearn_alone():
    code = (
        "import sys, matplotlib; matplotlib.use('svg'); import brats_helpers.report.plots;"
        " assert matplotlib.get_backend() == 'svg'; assert 'nilearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_strata_count_patients_and_slices_by_grade_and_size():
    table = pd.DataFrame(
        {
            "part": ["train"] * 4 + ["test"] * 2,
            "grade": ["HGG", "HGG", "LGG", None, "HGG", "LGG"],
            "tumour_ml": [10.0, 20.0, 30.0, 40.0, 50.0, 60.0],
            "slices": [5, 15, 25, 35, 45, 55],
        }
    )
    figure = plots.strata(table, simulated=True)
    read = {}
    for title, ax in panels(figure).items():
        ticks = [label.get_text() for label in ax.get_xticklabels()]
        read[title] = {
            part: dict(zip(ticks, [round(bar.get_height(), 1) for bar in bars], strict=True))
            for part, bars in zip(("train", "test"), ax.containers, strict=True)
        }
    assert read["Grade, patients"] == {
        "train": {"HGG": 50, "LGG": 25, "unknown": 25},
        "test": {"HGG": 50, "LGG": 50, "unknown": 0},
    }
    assert read["Grade, slices with tumour"]["train"] == {"HGG": 25, "LGG": 31.2, "unknown": 43.8}  # of 80
    thirds = ["10 to 20 ml", "30 to 40 ml", "50 to 60 ml"]
    assert read["Whole tumour, patients"] == {
        "train": dict(zip(thirds, (50, 50, 0), strict=True)),
        "test": dict(zip(thirds, (0, 0, 100), strict=True)),
    }
    numbers = [text.get_text() for text in panels(figure)["Whole tumour, slices with tumour"].texts]
    assert numbers == ["20", "60", "0", "0", "0", "100"]
    assert "simulated" in everything_said(figure)


def test_strata_of_one_patient_a_part():
    table = pd.DataFrame({"part": ["train", "val"], "grade": [None] * 2, "tumour_ml": [3.0, 3.0], "slices": [1, 2]})
    titles = ["Whole tumour, patients", "Whole tumour, slices with tumour"]  # no grade is known
    assert list(panels(plots.strata(table, simulated=False))) == titles


# --- the report's


def untiled(content, shape, columns):
    """The volume (X, Y, Z) that a picture of tiles holds."""
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    width, height, depth = shape
    corners = [(z // columns * height, z % columns * width) for z in range(depth)]
    return np.stack([pixels[y : y + height, x : x + width].T for y, x in corners], axis=2)


def test_viewer_tiles_hold_the_brain_and_both_segmentations(case, tmp_path):
    volume, image = read_image(case.images["t1ce"])
    truth = read_mask(case.seg, case.numbering)
    pred = np.roll(truth, 2, axis=1)
    write_mask(tmp_path / "p_seg.nii.gz", pred, image)
    tiles = plots.viewer_tiles(case, tmp_path / "p_seg.nii.gz")
    assert set(tiles["images"]) == set(case.images) and tiles["spacing"] == [1, 1, 1]

    box = tuple(slice(start, start + side) for start, side in zip(tiles["origin"], tiles["shape"], strict=True))
    outside = volume.astype(bool)
    outside[box] = False
    assert not outside.any()
    held = untiled(tiles["labels"], tiles["shape"], tiles["columns"])
    assert np.array_equal(held // 64, pred[box]) and np.array_equal(held // 16 % 4, truth[box])

    low, high = np.percentile(volume[volume != 0], (1, 99.5))
    grey = np.clip((volume[box] - low) / (high - low), 0, 1) * 255
    shown = untiled(tiles["images"]["t1ce"], tiles["shape"], tiles["columns"])
    assert np.abs(shown - grey).mean() < 6  # lossy
    fullest = [(truth > 0).sum(axis=axes).argmax() for axes in ((1, 2), (0, 2), (0, 1))]
    assert [a + b for a, b in zip(tiles["start"], tiles["origin"], strict=True)] == fullest


def test_volume_agreement_draws_the_limits_of_bland_and_altman():
    # Differences of 2 and 6 ml: mean 4, sample deviation sqrt(8) = 2.828, limits 4 -+ 5.544.
    cases = {
        name: {region: {"volume_ml": predicted, "volume_ml_truth": true} for region in ("WT", "TC", "ET")}
        for name, predicted, true in (("A", 12.0, 10.0), ("B", 26.0, 20.0))
    }
    figure = plots.volume_agreement({"cases": cases}, simulated=True)
    for ax, region in zip(figure.axes, ("WT", "TC", "ET"), strict=True):
        points, *lines = ax.lines
        assert points.get_xdata().tolist() == [11, 23] and points.get_ydata().tolist() == [2, 6]
        assert to_rgb(points.get_color()) == to_rgb(plots.COLOURS[region])
        assert [line.get_ydata()[0] for line in lines[:3]] == pytest.approx([4, -1.544, 9.544], abs=1e-3)
    assert {"+4.0", "-1.5", "+9.5"} <= set(everything_said(figure).split()) and "simulated" in everything_said(figure)


def test_volume_agreement_of_one_patient_has_no_limits():
    volumes = {region: {"volume_ml": 3.0, "volume_ml_truth": 4.0} for region in ("WT", "TC", "ET")}
    figure = plots.volume_agreement({"cases": {"A": volumes}}, simulated=False)
    assert [line.get_ydata()[0] for line in figure.axes[0].lines[1:]] == [-1, 0]
    assert "simulated" not in everything_said(figure)


def test_one_false_voxel_costs_the_whole_dice():
    """BraTS 2020 scores a false alarm as Dice 0 and the diagonal of 240 x 240 x 155 mm."""
    shown = list(panels(plots.one_false_voxel(name="brats2020")))
    assert shown[0] == "reference, no ET"
    assert shown[1:] == [
        "prediction without ET · Dice 1, HD95 0.00 mm",
        f"one false voxel · Dice 0, HD95 {np.linalg.norm([240, 240, 155]):.2f} mm",
    ]


def test_filters_show_the_colours_above_each_modality():
    colours = np.random.default_rng(0).normal(size=(16, 3, 3, 3))
    channels = colours[:, [0, 1, 2, 0]] * 3 / 4
    names = ["flair", "t1", "t1ce", "t2"]
    figure = plots.filters(colours, channels, modalities=names, encoder="resnet18", simulated=False)
    assert list(panels(figure)) == ["colours", "FLAIR", "T1", "T1ce", "T2"]
    assert "8 of 16 filters" in figure.get_label()
    pictures = [np.asarray(ax.images[0].get_array()) for ax in figure.axes]
    assert np.array_equal(pictures[8], pictures[32])  # FLAIR and T2 both start from red
    assert pictures[0].min() >= 0 and pictures[0].max() <= 1
