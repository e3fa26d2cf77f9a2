"""Brain-tumour segmentation on BraTS data: from scans to a trained, honestly scored network."""

__version__ = "0.1.0"
