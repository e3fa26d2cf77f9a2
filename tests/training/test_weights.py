"""Where weights come from: ImageNet's, a file's, a checkpoint's."""

from brats_helpers.training import weights
from brats_helpers.training.weights import PACKAGED_ENCODER


def test_auto_takes_what_can_be_had_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(weights, "why_unreachable", lambda encoder: "no network")
    assert weights.choose_encoder("auto", "imagenet") == PACKAGED_ENCODER
    assert "⚠️ no ImageNet weights for efficientnet-b0 (no network)" in capsys.readouterr().out
    monkeypatch.setattr(weights, "why_unreachable", lambda encoder: None)
    assert weights.choose_encoder("auto", "imagenet") == "efficientnet-b0"
    assert weights.choose_encoder("resnet18", "imagenet") == "resnet18"
    assert capsys.readouterr().out == ""
