"""Brain-tumour segmentation on BraTS data: from scans to a trained, honestly scored network.

The names below are enough for your own notebook. Each is imported on first use, so importing the package is instant.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = {
    "audit": "data.audit",
    "find_cases": "data.cases",
    "prepare": "data.cache",
    "split_cases": "data.splits",
    "build_model": "training.model",
    "CrossEntropyDice": "training.losses",
    "Settings": "training.settings",
    "fit": "training.loop",
    "load_network": "evaluation.inference",
    "predict": "evaluation.inference",
    "predict_folders": "evaluation.inference",
    "score_case": "scoring.scores",
    "score_folders": "evaluation.folders",
    "Run": "runs",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
