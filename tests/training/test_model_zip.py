"""A model zip: what is written is read again, and anything else is refused with one sentence."""

import json
import pickle
import zipfile

import pytest
import torch

from brats_helpers.training.model_zip import ModelZipError, read_facts, read_model, write_model

CHECKPOINT = {"format": 0, "settings": {"encoder": "x"}, "model": {"layer.weight": torch.arange(6.0).reshape(2, 3)}}


@pytest.fixture
def path(tmp_path):
    write_model(tmp_path / "model.zip", CHECKPOINT, facts={"postprocess": {"et_voxels": 30}}, card="# card")
    return tmp_path / "model.zip"


def rewritten(path, **members):
    """The zip with some members replaced or added."""
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in (content | members).items():
            new.writestr(name, data)


def test_weights_and_facts_come_back(path):
    found = read_model(path)
    assert torch.equal(found["model"]["layer.weight"], CHECKPOINT["model"]["layer.weight"])
    assert found["settings"] == {"encoder": "x"}
    assert read_facts(path)["postprocess"] == {"et_voxels": 30}
    assert zipfile.ZipFile(path).read("model_card.md") == b"# card"


@pytest.mark.parametrize("name", ["../../evil.txt", "/etc/passwd", "weights.pkl", "archive/data.pkl"])
def test_a_zip_with_any_other_member_is_refused(path, name):
    rewritten(path, **{name: pickle.dumps(print)})
    with pytest.raises(ModelZipError, match="a model holds only"):
        read_model(path)


def test_a_torn_zip_is_refused(path):
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelZipError, match="is no zip file, or is damaged"):
        read_model(path)


def test_damaged_weights_are_refused(path):
    rewritten(path, **{"weights.safetensors": b"\xff" * 64})
    with pytest.raises(ModelZipError, match="weights.safetensors is damaged"):
        read_model(path)


def test_a_huge_declared_size_is_refused_before_anything_is_read(path):
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")  # the central directory's first entry: the weights
    content[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ModelZipError, match="claims 4,294,967,280 bytes"):
        read_model(path)


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"kind": "other"}, "is no model of this suite"),
        ({"version": 99}, "has version 99"),
        ({"checkpoint": 3}, "no model"),
    ],
)
def test_another_format_is_refused(path, facts, message):
    rewritten(path, **{"model.json": json.dumps(read_facts(path) | facts)})
    with pytest.raises(ModelZipError, match=message):
        read_model(path)


def test_a_missing_file_and_a_missing_member_are_named(path, tmp_path):
    with pytest.raises(ModelZipError, match="export RUN --out none.zip"):
        read_model(tmp_path / "none.zip")
    with zipfile.ZipFile(path, "w") as empty:
        empty.writestr("model.json", "{}")
    with pytest.raises(ModelZipError, match="it has no weights.safetensors"):
        read_model(path)
