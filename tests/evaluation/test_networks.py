"""Networks out of checkpoints, and their probabilities for prepared patients."""

import dataclasses

import numpy as np
import pytest
import torch

from brats_helpers.data.cache import pack, slice_boxes
from brats_helpers.data.cases import find_cases
from brats_helpers.data.content import image_hash
from brats_helpers.evaluation import networks
from brats_helpers.evaluation.networks import Network, in_order, leaked, load_network, load_networks, predict
from brats_helpers.labels import MODALITIES, DataError
from tests.conftest import write_tiny_case
from tests.evaluation.echo import echo, with_classes_as_images
from tests.tiny_training import fit_tiny

CPU = torch.device("cpu")
ORDER = {"channels": MODALITIES, "flips": False}


def test_a_checkpoint_alone_rebuilds_the_network(checkpoint):
    network = load_network(checkpoint, device=CPU)
    assert network.modalities == ["flair", "t1", "t1ce", "t2"]
    assert network.trained_on == {"Tiny_0", "Tiny_1", "Tiny_2"} and network.chosen_by == {"Tiny_3"}
    saved = torch.load(checkpoint, weights_only=True)["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in network.model.state_dict().items())
    assert not network.model.training


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(DataError, match="no checkpoint at"):
        load_network(tmp_path / "best.pt", device=CPU)
    (tmp_path / "text.pt").write_text('{"a": 1}')
    with pytest.raises(DataError, match="text.pt is no checkpoint"):
        load_network(tmp_path / "text.pt", device=CPU)
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(DataError, match="other.pt is no checkpoint"):
        load_network(tmp_path / "other.pt", device=CPU)


@pytest.mark.parametrize("flips", [False, True])
def test_every_voxel_comes_back_where_it_was(tiny_patients, flips):
    packed = with_classes_as_images(find_cases(tiny_patients)[0])
    classes = packed.to_volume(predict([echo()], packed, channels=MODALITIES, flips=flips).argmax(axis=1))
    np.testing.assert_array_equal(classes, packed.to_volume(packed.labels))
    assert classes.shape == (48, 56, 20)


def test_probabilities_are_averaged_over_networks(tiny_patients):
    packed = with_classes_as_images(find_cases(tiny_patients)[0])
    # A logit of log 9 against three of 0 is a probability of 9/12, one of 0 a quarter each; half-way is 1/2.
    soft = predict([echo(float(np.log(9))), echo(0.0)], packed, **ORDER)
    said = np.take_along_axis(soft, packed.labels[:, None].astype(np.int64), axis=1)[:, 0]
    np.testing.assert_allclose(said[packed.brain], (9 / 12 + 1 / 4) / 2, atol=2e-3)
    np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-3)


def test_each_network_reads_its_channels_by_name(tiny_patients):
    """Flair holds the classes, the other modalities a tumour that fills the brain."""
    case = find_cases(tiny_patients)[0]
    packed = with_classes_as_images(case)
    packed.images[:, 1:] = 3 * packed.brain[:, None]
    forward, backward = echo(), echo(modalities=("t2", "t1ce", "t1", "flair"))
    for channels in (MODALITIES, ("t1", "t2", "t1ce", "flair")):
        shown = dataclasses.replace(packed, images=packed.images[:, [MODALITIES.index(name) for name in channels]])
        assert (predict([forward], shown, channels=channels, flips=False).argmax(1) == packed.labels).all()
        soft = predict([backward], shown, channels=channels, flips=False)
        assert (soft.argmax(1) == 3 * packed.brain).all()


def test_cases_are_put_into_the_networks_order_or_refused(tiny_patients):
    (case, *_) = find_cases(tiny_patients, ["t2", "flair"])
    assert list(in_order([echo(modalities=("flair", "t2"))], [case])[0].images) == ["flair", "t2"]
    with pytest.raises(DataError, match="Tiny_0: the network reads flair, t1, t1ce, t2, but there is no t1, t1ce"):
        in_order([echo()], [case])


def test_networks_of_other_modalities_are_not_averaged(checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    for name, modalities in (("turned.pt", ("t2", "t1ce", "t1", "flair")), ("other.pt", ("t1", "flair"))):
        saved["settings"]["modalities"] = modalities
        torch.save(saved, tmp_path / name)
    assert len(load_networks([checkpoint, tmp_path / "turned.pt"], device=CPU)) == 2
    with pytest.raises(DataError, match="other.pt reads t1, flair, but .*best.pt flair, t1, t1ce, t2"):
        load_networks([checkpoint, tmp_path / "other.pt"], device=CPU)


def test_another_architecture_may_be_averaged(checkpoint, tiny_patients, tmp_path):
    packed = [pack(case) for case in find_cases(tiny_patients)]
    fit_tiny(packed, tmp_path, encoder="tu-mobilenetv3_small_050", context_slices=1, epochs=1)
    pair = load_networks([checkpoint, tmp_path / "checkpoints" / "best.pt"], device=CPU)
    both, one, other = (predict(each, packed[0], **ORDER) for each in (pair, *zip(pair)))
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-6)
    assert abs(one - other).max() > 0.01


def test_probabilities_sum_to_one_and_slices_without_brain_are_background(checkpoint, tiny_patients):
    packed = pack(find_cases(tiny_patients)[0])
    packed.images[0] = 0
    packed = dataclasses.replace(packed, boxes=None)
    soft = predict([load_network(checkpoint, device=CPU)], packed, channels=MODALITIES, flips=True)
    np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-3)
    assert (soft[0, 0] == 1).all()


# --- Boxes: each slice is predicted within its own brain, in the smallest multiples of 32 that hold it.


class Local(torch.nn.Module):
    """One convolution of 5 x 5 pixels without bias, for which padding is the same as background."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(4, 4, 5, padding=2, bias=False)

    def forward(self, images):
        return self.layer(images)


def local():
    settings = {"modalities": MODALITIES, "context_slices": 0, "patch_size": 0}
    return Network(Local().eval(), settings, frozenset(), frozenset(), 1)


@pytest.fixture
def uneven():
    """Slices whose brains have sizes from 3 x 4 to 70 x 40, and one without."""
    random = np.random.default_rng(0)
    brain = np.zeros((6, 72, 44), bool)
    for z, (top, bottom, left, right) in enumerate([(2, 5, 9, 13), (1, 71, 2, 42), (30, 60, 4, 40), (0, 33, 0, 31)]):
        brain[z + (z > 2), top:bottom, left:right] = True
    images = (random.normal(1, 1, (6, 4, 72, 44)) * brain[:, None]).astype(np.float16)
    return dataclasses.replace(_empty(images), boxes=slice_boxes((images != 0).any(axis=1)))


def _empty(images):
    depth, _, height, width = images.shape
    counts = np.zeros((depth, 4), np.int64)
    return networks.Packed("P", images, None, (0, 0, 0), (width, height, depth), counts)


def test_predictions_within_the_box_equal_those_of_the_full_slice(uneven):
    """To the precision of float32 where padding is the same as background.

    A deep network pads its feature maps with zeros where the full slice has features of background, so that it agrees
    within a tolerance, see the next test.
    """
    network = local()
    with torch.inference_mode():
        full = network.model(torch.from_numpy(uneven.images).float()).softmax(dim=1).numpy()
    soft = predict([network], uneven, **ORDER)
    own, expected = (np.moveaxis(found, 1, -1)[uneven.brain] for found in (soft, full))
    np.testing.assert_allclose(own, expected, atol=1e-6)


def test_a_trained_network_predicts_nearly_the_same_within_the_box_and_in_the_full_slice(checkpoint, tiny_patients):
    """Of the tiny patients' brain, box and full slice disagree about less than one voxel in a hundred."""
    network, packed = load_network(checkpoint, device=CPU), pack(find_cases(tiny_patients)[3])
    whole = np.tile([0, packed.images.shape[2], 0, packed.images.shape[3]], (len(packed.images), 1))
    own, full = (
        predict([network], dataclasses.replace(packed, boxes=boxes), **ORDER).argmax(1)[packed.brain]
        for boxes in (packed.boxes, whole)
    )
    assert (own != full).mean() < 0.01


def test_a_slice_does_not_depend_on_the_other_slices(checkpoint, uneven):
    network = load_network(checkpoint, device=CPU)
    alone = uneven.images.copy()
    alone[[0, 1, 4]] = 0
    soft = predict([network], uneven, **ORDER)
    np.testing.assert_allclose(predict([network], _empty(alone), **ORDER)[2], soft[2], atol=1e-5)


def test_with_flips_a_mirrored_patient_gets_the_mirrored_answer(checkpoint, uneven):
    """To the bit where the brain's width is even: it then lies in the middle of its box either way round."""
    network = load_network(checkpoint, device=CPU)
    chosen = uneven.images[[1, 2]]  # 40 and 36 wide
    there, back = (
        predict([network], _empty(np.ascontiguousarray(images)), channels=MODALITIES, flips=True)
        for images in (chosen, chosen[..., ::-1])
    )
    np.testing.assert_array_equal(back[..., ::-1], there)


# --- Leakage


def test_patients_are_recognised_by_id_by_person_and_by_the_scans(tiny_patients, tmp_path):
    new = find_cases(write_tiny_case(tmp_path, "New", seed=9))
    assert list(leaked([echo(trained_on=["New"]), echo()], new)) == ["New"]  # one of several networks is enough
    assert leaked([echo()], new) == {}
    (renamed,) = find_cases(write_tiny_case(tmp_path / "again", "Other", seed=0))  # the scans of Tiny_0
    known = {"Tiny_0": {"content": None, "group": "Tiny_0", "images": [image_hash(renamed.read("t1")[0])]}}
    assert "voxel for voxel" in leaked([echo(patients=known)], [renamed])["Other"]
    visit = find_cases(write_tiny_case(tmp_path / "visit", "BraTS-GLI-00001-001", seed=5))
    assert list(leaked([echo(trained_on=["BraTS-GLI-00001-000"])], visit)) == ["BraTS-GLI-00001-001"]
