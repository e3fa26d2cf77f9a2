"""Where weights come from: ImageNet's, a file's, a checkpoint's."""

import dataclasses

import pytest
import torch

from brats_helpers.data.cache import pack
from brats_helpers.data.cases import find_cases
from brats_helpers.labels import MODALITIES
from brats_helpers.training import model_zip, weights
from brats_helpers.training.checkpoint import FORMAT, WeightsError, with_start
from brats_helpers.training.model import DECODER, build_model
from brats_helpers.training.preflight import settle
from brats_helpers.training.weights import PACKAGED_ENCODER
from tests.tiny_training import CUBES, SETTINGS, fit_tiny
from tests.tiny_training import weights as saved_by

NETWORK = {"encoder": SETTINGS.encoder, "decoder": (128, 64, 32, 16, 16)}


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """A packaged network that reads the modalities in another order than runs do."""
    path = tmp_path_factory.mktemp("packaged") / "simulated.safetensors"
    settings = (
        dataclasses.asdict(SETTINGS) | NETWORK | {"modalities": ["t2", "t1ce", "flair", "t1"], "modality_dropout": 0.5}
    )
    model = build_model(**NETWORK, weights="none", in_channels=4)
    checkpoint = {"format": FORMAT, "settings": settings, "in_channels": 4, "model": model.state_dict(), "epoch": 1}
    checkpoint |= {"train_cases": ["Sim_9_000"], "val_cases": ["Sim_9_001"], "facts": {"patients": {"Sim_9_000": {}}}}
    model_zip.write_model(path, checkpoint, facts={}, card="", half=True)
    return path


@pytest.fixture(autouse=True)
def in_place(packaged, monkeypatch):
    monkeypatch.setattr(model_zip, "PACKAGED", packaged)


def logits(network, **modalities):
    """What a network answers to images of some modalities, (2, 64, 64), in the order given; the middle of 2.5D."""
    with torch.no_grad():
        return network.eval()(torch.cat([images[:, None] for images in modalities.values()], dim=1))


def some_images():
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 64, 64, generator=random) for name in MODALITIES}


def stored(packaged):
    """The packaged network as it was trained."""
    network = build_model(**NETWORK, weights="none", in_channels=4)
    network.load_state_dict(model_zip.read_model(packaged)["model"])
    return network


@pytest.mark.parametrize("names", [MODALITIES, ("t1ce", "flair"), ("t2",)])
def test_training_starts_from_the_packaged_network_whatever_modalities_it_has(packaged, names):
    start = build_model(**NETWORK, weights="simulated", in_channels=len(names), modalities=names)
    images = some_images()
    hidden = {name: images[name] if name in names else torch.zeros(2, 64, 64) for name in ("t2", "t1ce", "flair", "t1")}
    expected = logits(stored(packaged), **hidden)
    torch.testing.assert_close(logits(start, **{name: images[name] for name in names}), expected, atol=1e-4, rtol=1e-4)


def test_neighbouring_slices_and_modalities_that_a_start_does_not_know_begin_without_effect(packaged):
    images, others = some_images(), {name: 5 + image for name, image in some_images().items()}
    start = build_model(**NETWORK, weights="simulated", in_channels=12, modalities=MODALITIES)
    slices = torch.stack([torch.stack([*some.values()], dim=1) for some in (others, images, others)], dim=1)
    with torch.no_grad():
        found = start.eval()(slices.flatten(1, 2))
    expected = logits(stored(packaged), **{name: images[name] for name in ("t2", "t1ce", "flair", "t1")})
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"encoder": "resnet18"}, f"with encoder {SETTINGS.encoder} and decoder 128,.*asked for are resnet18"),
        (
            {"decoder": (256, 128, 64, 32, 16)},
            "asked for are .* and 256,128,64,32,16. Take .*-p decoder 128,64,32,16,16",
        ),
    ],
)
def test_another_network_than_the_start_is_refused_with_what_to_take(asked, said):
    with pytest.raises(WeightsError, match=f"'simulated' is a network .*{said}"):
        build_model(**NETWORK | asked, weights="simulated", in_channels=4, modalities=MODALITIES)


@pytest.mark.parametrize(
    "settings, asked, said",
    [
        (dataclasses.replace(SETTINGS, context_slices=1), {}, "sees 1 neighbouring slices on each side, not 0"),
        (dataclasses.replace(SETTINGS, modalities=("t2",)), {"modalities": ("flair",)}, "of t2, which knows none of"),
        (CUBES, {"modalities": ("t1", "flair", "t1ce", "t2"), "patch_size": 32}, "3D network of flair, t1, t1ce, t2"),
    ],
)
def test_a_checkpoint_of_another_input_is_refused(tmp_path, settings, asked, said):
    channels = len(settings.modalities) * (2 * settings.context_slices + 1)
    network = {"encoder": settings.encoder, "decoder": settings.decoder, "patch_size": settings.patch_size}
    state = build_model(**network, weights="none", in_channels=channels).state_dict()
    saved = {"format": FORMAT, "settings": dataclasses.asdict(settings), "in_channels": channels, "model": state}
    torch.save(saved, tmp_path / "best.pt")
    how = {"modalities": settings.modalities} | asked
    with pytest.raises(WeightsError, match=said):
        build_model(**network | how, weights=str(tmp_path / "best.pt"), in_channels=len(how["modalities"]))


def test_a_training_from_the_packaged_network_knows_who_that_has_seen(packaged, tiny_patients, tmp_path):
    names = ("flair", "t1ce")
    prepared = [pack(case) for case in find_cases(tiny_patients, names)]
    how = NETWORK | {"modalities": names, "encoder_weights": "simulated", "lr": 1e-12, "weight_decay": 0.0, "ema": 0.0}
    fit_tiny(prepared, tmp_path, epochs=1, **how)
    saved, start = saved_by(tmp_path, "best.pt"), model_zip.read_model(packaged)["model"]
    assert saved["train_cases"] == ["Sim_9_000", "Tiny_0", "Tiny_1", "Tiny_2"]
    assert saved["val_cases"] == ["Sim_9_001", "Tiny_3"]
    assert "Sim_9_000" in saved["facts"]["patients"]
    first = "encoder.model.conv_stem.weight"
    torch.testing.assert_close(saved["model"][first], start[first][:, [2, 1]])  # flair and t1ce among its channels


def test_a_start_from_a_file_without_a_list_of_patients_is_remembered(tmp_path):
    torch.save({"stem.weight": torch.zeros(1)}, tmp_path / "checkpoint_final.pth")
    facts = with_start({"spacing_mm": 1.0}, str(tmp_path / "checkpoint_final.pth"))
    assert facts == {"spacing_mm": 1.0, "unrecorded": "checkpoint_final.pth"}
    saved = {"format": FORMAT, "settings": {}, "model": {}, "facts": facts}
    torch.save(saved, tmp_path / "best.pt")
    assert with_start({}, str(tmp_path / "best.pt"))["unrecorded"] == "checkpoint_final.pth"  # and in the next one
    assert with_start({}, "imagenet") == {}


def settled(text="", patients=2, **changes):
    names = ("modalities", "encoder", "context_slices", "epochs", "minutes", "batch_size", "lr", "augment", "seed")
    values = {name: getattr(SETTINGS, name) for name in names} | {"encoder_weights": "simulated"}
    return settle(text, patients=patients, device=torch.device("cpu"), **values | changes)[0]


def test_a_training_from_the_packaged_network_takes_its_encoder():
    assert settled(encoder="auto").encoder == SETTINGS.encoder


def test_the_default_decoder_is_the_packaged_network_s(monkeypatch):
    monkeypatch.undo()
    assert tuple(weights.packaged_settings()["decoder"]) == DECODER


def test_auto_starts_from_the_packaged_network_where_that_fits_and_patients_are_few(monkeypatch):
    few, many = weights.FEW, weights.FEW + 1
    monkeypatch.setattr(weights, "why_unreachable", lambda encoder: None)
    assert settled(patients=few, encoder_weights="auto", encoder="auto").encoder_weights == "simulated"
    assert settled(patients=few, encoder_weights="auto").encoder_weights == "simulated"
    assert settled(patients=many, encoder_weights="auto").encoder_weights == "imagenet"
    assert settled(patients=many, encoder_weights="auto", encoder="auto").encoder == "efficientnet-b0"
    assert settled(patients=few, encoder_weights="auto", encoder="resnet18").encoder_weights == "imagenet"
    assert settled("decoder=64,32,16,8,4", encoder_weights="auto").encoder_weights == "imagenet"
    assert settled(patients=few, encoder_weights="auto", encoder="monai-unet").encoder_weights == "none"
    volumes = {"encoder": f"acs-{SETTINGS.encoder}", "own_decoder": False}
    assert weights.choose_start(**volumes, patients=few) == "simulated"
    assert weights.choose_start(**volumes, patients=many) == "imagenet"


def test_auto_does_without_a_packaged_network_that_is_not_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model_zip, "PACKAGED", tmp_path / "simulated.safetensors")
    assert settled(patients=2, encoder_weights="auto").encoder_weights == "imagenet"
    assert "It starts from ImageNet's weights" in capsys.readouterr().out


def test_auto_takes_what_can_be_had_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(weights, "why_unreachable", lambda encoder: "no network")
    assert weights.choose_encoder("auto", "imagenet") == PACKAGED_ENCODER
    assert "⚠️ no ImageNet weights for efficientnet-b0 (no network)" in capsys.readouterr().out
    monkeypatch.setattr(weights, "why_unreachable", lambda encoder: None)
    assert weights.choose_encoder("auto", "imagenet") == "efficientnet-b0"
    assert weights.choose_encoder("resnet18", "imagenet") == "resnet18"
    assert weights.choose_weights(f"acs-{PACKAGED_ENCODER}", "auto") == "imagenet"
    assert capsys.readouterr().out == ""
