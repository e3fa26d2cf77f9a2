"""Settings: every field is checked, and the message names the field, the value and what is allowed."""

import dataclasses

import pytest

from brats_helpers.training.settings import (
    Execution,
    Settings,
    SettingsError,
    check_text,
    defaults,
    explained,
    from_text,
)
from tests.tiny_training import SETTINGS

AS_TEXT = {name: str(value) for name, value in dataclasses.asdict(SETTINGS).items()} | {
    "modalities": "flair, t1,t1ce,t2",
    "decoder": "256,128,64,32,16",
    "class_weights": "1,1,1,1",
    "frozen_statistics": "true",
}


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("modalities", (), "one or more of flair, t1, t1ce, t2, each once"),
        ("modalities", "flair", "one or more of"),
        ("modalities", ("flair", "flair"), "each once"),
        ("modalities", ("flair", "t9"), "one or more of"),
        ("encoder", "", "a name"),
        ("decoder", (256, 128), "5 whole numbers of at least 1"),
        ("decoder", (256, 128, 64, 32, 0), "5 whole numbers of at least 1"),
        ("context_slices", -1, "a whole number of at least 0"),
        ("context_slices", 1.0, "a whole number of at least 0"),
        ("epochs", 0, "a whole number of at least 1"),
        ("epochs", True, "a whole number of at least 1"),
        ("minutes", -0.5, "a number of at least 0"),
        ("minutes", float("inf"), "a number of at least 0"),
        ("batch_size", 0, "a whole number of at least 1"),
        ("foreground", 1.5, "a share up to 1"),
        ("augment", "wild", "one of none, basic, strong"),
        ("modality_dropout", 1.1, "a share from 0 to 1"),
        ("class_weights", (1, 1, 1), "4 numbers of at least 0, not all 0"),
        ("class_weights", (1, 1, 1, -1), "4 numbers of at least 0, not all 0"),
        ("class_weights", (0, 0, 0, 0), "4 numbers of at least 0, not all 0"),
        ("class_weights", (1, 1, 1, float("nan")), "4 numbers of at least 0, not all 0"),
        ("lr", 0.0, "a number above 0"),
        ("lr", float("nan"), "a number above 0"),
        ("lr", "0.1", "a number above 0"),
        ("encoder_lr", 1.1, "a share from 0 to 1"),
        ("weight_decay", -1e-3, "a number of at least 0"),
        ("warm_up", 1.01, "a share from 0 to 1"),
        ("frozen_statistics", 1, "true or false"),
        ("ema", 1.0, "a number of at least 0 and below 1"),
        ("ema", -0.1, "a number of at least 0 and below 1"),
        ("patience", -1, "a whole number of at least 0"),
        ("precision", "int8", "one of auto, float32, bf16, fp16"),
        ("seed", -1, "a whole number of at least 0"),
    ],
)
def test_a_forbidden_value_is_refused_with_its_field(field, value, allowed):
    with pytest.raises(SettingsError, match=f"^{field} .*: expected .*{allowed}"):
        dataclasses.replace(SETTINGS, **{field: value})


@pytest.mark.parametrize("encoder, patch_size", [("resnet18", 64), ("monai-unet", 0)])
def test_patch_size_and_encoder_must_fit(encoder, patch_size):
    with pytest.raises(SettingsError, match=f"patch_size {patch_size}: {encoder} sees"):
        dataclasses.replace(SETTINGS, encoder=encoder, patch_size=patch_size)


def test_the_only_modality_cannot_be_hidden():
    with pytest.raises(SettingsError, match="modality_dropout 0.5: expected 0.0, as t1ce is the only modality"):
        dataclasses.replace(SETTINGS, modalities=("t1ce",), modality_dropout=0.5)


def test_settings_written_before_modality_dropout_existed_hide_none():
    older = {name: value for name, value in dataclasses.asdict(SETTINGS).items() if name != "modality_dropout"}
    assert Settings(**older) == SETTINGS == Settings.parse(**older)


def test_text_gives_the_same_settings_as_typed_values():
    assert Settings.parse(**AS_TEXT) == SETTINGS


def test_lists_and_whole_numbers_are_brought_to_the_fields_types():
    settings = dataclasses.replace(SETTINGS, modalities=["flair", "t1"], lr=1, class_weights=[0, 1, 1, 2])
    assert settings.modalities == ("flair", "t1") and settings.class_weights == (0.0, 1.0, 1.0, 2.0)
    assert isinstance(settings.lr, float)


def test_text_takes_precedence_and_may_hold_lists():
    settings = Settings.parse("ema=0.5, class_weights=1,2,3,4,warm_up = 0.1", **AS_TEXT)
    assert (settings.ema, settings.class_weights, settings.warm_up) == (0.5, (1, 2, 3, 4), 0.1)
    assert from_text("") == {}


@pytest.mark.parametrize(
    "text, message",
    [
        ("warmup=0.1", "no setting 'warmup': did you mean warm_up"),
        ("zzz=1", "no setting 'zzz': expected one of modalities, encoder"),
        ("ema", "'ema': expected name=value"),
        ("ema=", "'ema=': expected name=value"),
        ("ema=0.5, ema=0.6", "ema is given twice"),
        ("ema=high", "ema 'high': expected a number of at least 0 and below 1"),
        ("class_weights=1,1,1", "class_weights 1.0,1.0,1.0: expected 4 numbers"),
        ("frozen_statistics=perhaps", "frozen_statistics 'perhaps': expected true or false"),
        ("epochs=2.5", "epochs '2.5': expected a whole number of at least 1"),
    ],
)
def test_text_that_cannot_be_used_is_refused(text, message):
    with pytest.raises(SettingsError, match=message):
        Settings.parse(text, **AS_TEXT)


def test_every_setting_is_explained():
    """The docstring is the one home of the meanings: --help and notebook 02 show them."""
    rows = {row["setting"]: row for row in explained(SETTINGS, Execution(processes=2))}
    names = [field.name for kind in (Settings, Execution) for field in dataclasses.fields(kind)]
    assert list(rows) == names and all(len(row["meaning"]) > 10 for row in rows.values())
    assert rows["decoder"]["value"] == "256,128,64,32,16" and rows["frozen_statistics"]["value"] == "true"
    assert rows["processes"]["value"] == "2"
    assert rows["foreground"]["meaning"].endswith("a negative number keeps the data's own share.")


def test_defaults_are_values_that_may_be_written():
    for name, default in defaults().items():
        check_text(name, default.text)
    needed = {name: AS_TEXT[name] for name in AS_TEXT if name not in defaults()}
    written = {
        name: default.text for name, default in defaults().items() if name in AS_TEXT or name == "modality_dropout"
    }
    assert Settings.parse(**needed) == Settings.parse(**needed | written)


def test_how_a_training_is_carried_out_is_checked_too():
    assert Execution.parse("processes=2, deterministic=true") == Execution(processes=2, deterministic=True)
    with pytest.raises(SettingsError, match="no setting 'ema': expected one of loader_workers, processes"):
        Execution.parse("ema=0.9")
    with pytest.raises(SettingsError, match="checkpoint_minutes -1.0: expected a number of at least 0"):
        Execution(checkpoint_minutes=-1)


def test_a_missing_setting_is_named():
    with pytest.raises(SettingsError, match="settings without lr"):
        Settings.parse(**{name: value for name, value in AS_TEXT.items() if name != "lr"})
