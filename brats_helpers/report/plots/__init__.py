"""Every figure of the notebooks and the report, one function each.

Each function returns a matplotlib figure that is shown once, as a cell's last value, and saved by `save_figure`.
Patients are drawn as radiologists see them: anterior (or head) up, the patient's right on the left. A region has the
same colour everywhere, and also a line style and a marker, for print and for colour-blind readers.
"""

from brats_helpers.report.plots.patients import gif, histograms, modalities, montage, planes
from brats_helpers.report.plots.scores import (
    best_median_worst,
    calibration,
    doubt,
    one_false_voxel,
    overlays,
    patient_dice,
    score_distributions,
    strata,
    volume_agreement,
)
from brats_helpers.report.plots.style import COLOURS, PRINTED, save_figure
from brats_helpers.report.plots.training import (
    augmentation,
    balance,
    batch,
    comparison,
    filters,
    live_curves,
    training_curves,
)
from brats_helpers.report.plots.viewer import interactive_view, toggled_view, viewer_tiles

__all__ = [
    "COLOURS",
    "PRINTED",
    "augmentation",
    "balance",
    "batch",
    "best_median_worst",
    "calibration",
    "comparison",
    "doubt",
    "filters",
    "gif",
    "histograms",
    "interactive_view",
    "live_curves",
    "modalities",
    "montage",
    "one_false_voxel",
    "overlays",
    "patient_dice",
    "planes",
    "save_figure",
    "score_distributions",
    "strata",
    "toggled_view",
    "training_curves",
    "viewer_tiles",
    "volume_agreement",
]
