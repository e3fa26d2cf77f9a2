"""Predict with an exported ONNX file through onnxruntime."""

from pathlib import Path

import torch
from torch import nn

from brats_helpers.files import read_json
from brats_helpers.labels import DataError

KIND, VERSION = "brats_helpers ONNX", 1


class OnnxNetwork(nn.Module):
    """An ONNX file with the interface of a network of slices.

    Args:
        path: of the `.onnx` file.

    Raises:
        DataError: onnxruntime is not installed, or the file is not an ONNX model.
    """

    def __init__(self, path: Path):
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise DataError(
                f"{path} is read by onnxruntime, which is not installed: pip install onnxruntime."
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no public base class of its errors
            raise DataError(
                f"{path} is not an ONNX model ({type(error).__name__}: {error}). Export it again."
            ) from error
        self.register_parameter("device", nn.Parameter(torch.zeros(0), requires_grad=False))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, 4, height, width), float32, of images (batch, channels, height, width)."""
        (logits,) = self._session.run(None, {"images": images.float().contiguous().numpy()})
        return torch.from_numpy(logits)


def read_onnx(path: Path) -> tuple[OnnxNetwork, dict]:
    """The network of an ONNX file, and the entries of its checkpoint from the `.json` beside it.

    Raises:
        DataError: a file is missing, damaged, or of another kind or version.
    """
    description = path.with_suffix(".json")
    for file in (path, description):
        if not file.is_file():
            raise DataError(
                f"{file} is missing. `python -m brats_helpers export RUN --onnx --out {path.name}` writes both."
            )
    try:
        content = read_json(description)
    except ValueError as error:
        raise DataError(str(error)) from error
    known = isinstance(content, dict) and (content.get("kind"), content.get("version")) == (KIND, VERSION)
    if not known or not isinstance(content.get("checkpoint"), dict):
        raise DataError(
            f"{description} does not describe an ONNX file of this suite, version {VERSION}. Export it again."
        )
    return OnnxNetwork(path), content["checkpoint"]
