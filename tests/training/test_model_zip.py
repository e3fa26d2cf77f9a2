"""A model file: what is written is read again, and anything else is refused with one sentence."""

import json
import pickle
import zipfile

import pytest
import safetensors.torch
import torch

from brats_helpers.training.model_zip import ModelZipError, halved, read_facts, read_model, write_model

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


@pytest.fixture
def tensors(tmp_path):
    """The same model as a safetensors file."""
    write_model(tmp_path / "model.safetensors", CHECKPOINT, facts={"postprocess": {"et_voxels": 30}}, card="# card")
    return tmp_path / "model.safetensors"


def test_a_safetensors_file_holds_the_same_and_the_card_lies_beside_it(path, tensors):
    assert read_facts(tensors) == read_facts(path)
    assert torch.equal(read_model(tensors)["model"]["layer.weight"], CHECKPOINT["model"]["layer.weight"])
    assert tensors.with_suffix(".md").read_text() == "# card"


def test_a_safetensors_file_that_is_torn_or_of_something_else_is_refused(tensors):
    whole = tensors.read_bytes()
    for content in (whole[:-4], whole[:100], b"", b"\xff" * 64):
        tensors.write_bytes(content)
        with pytest.raises(ModelZipError, match="is not a safetensors file, or is damaged"):
            read_model(tensors)
    tensors.write_bytes(safetensors.torch.save(CHECKPOINT["model"]))
    with pytest.raises(ModelZipError, match="is not a model of this suite"):
        read_model(tensors)
    with pytest.raises(ModelZipError, match="export RUN --out none.safetensors"):
        read_model(tensors.with_name("none.safetensors"))


@pytest.mark.parametrize("suffix", [".zip", ".safetensors"])
def test_half_precision_rounds_weights_and_keeps_statistics(tmp_path, suffix):
    tensors = {
        "weight": torch.tensor([[1 / 3, -2.0]]),
        "running_var": torch.tensor([1e-9, 1e6]),  # float16 would make them 0 and infinity
        "num_batches_tracked": torch.tensor(70_000),
    }
    write_model(tmp_path / f"m{suffix}", CHECKPOINT | {"model": tensors}, facts={}, card="", half=True)
    found = read_model(tmp_path / f"m{suffix}")["model"]
    assert torch.equal(found["weight"], torch.tensor([[1 / 3, -2.0]]).half().float())
    assert found["weight"].dtype == torch.float32 and not torch.equal(found["weight"], tensors["weight"])
    assert torch.equal(found["running_var"], tensors["running_var"]) and found["num_batches_tracked"] == 70_000


def test_a_weight_that_half_precision_cannot_hold_is_refused():
    with pytest.raises(ModelZipError, match="big holds a weight that does not fit into half precision"):
        halved({"big": torch.tensor([[1e5]])})


@pytest.mark.parametrize("name", ["../../evil.txt", "/etc/passwd", "weights.pkl", "archive/data.pkl"])
def test_a_zip_with_any_other_member_is_refused(path, name):
    rewritten(path, **{name: pickle.dumps(print)})
    with pytest.raises(ModelZipError, match="a model holds only"):
        read_model(path)


def test_a_torn_zip_is_refused(path):
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelZipError, match="is no zip file, or is damaged"):
        read_model(path)


@pytest.mark.parametrize("weights", [b"\xff" * 64, pickle.dumps(print), b""])
def test_damaged_weights_and_a_pickle_in_their_place_are_refused(path, weights):
    rewritten(path, **{"weights.safetensors": weights})
    with pytest.raises(ModelZipError, match="weights.safetensors is damaged"):
        read_model(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_packed_again_is_read_and_refused_where_it_is_damaged(path, method):
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in content.items():
            new.writestr(name, data)
    assert torch.equal(read_model(path)["model"]["layer.weight"], CHECKPOINT["model"]["layer.weight"])
    packed = path.read_bytes()
    begin = 30 + len("weights.safetensors")  # of the first member's data, after its header
    for at in (begin, begin + 10):
        path.write_bytes(packed[:at] + b"\xff" * 8 + packed[at + 8 :])
        with pytest.raises(ModelZipError, match="is no zip file, or is damaged"):
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
        ({"kind": "other"}, "is not a model of this suite"),
        ({"version": 99}, "has version 99"),
        ({"checkpoint": 3}, "not a model"),
    ],
    ids=str,
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
