"""Reading and writing NIfTI: damaged files, orientation, headers that contradict themselves."""

import gzip
import itertools
import re

import nibabel as nib
import numpy as np
import pytest

from brats_helpers import labels
from brats_helpers.data import nifti
from brats_helpers.data.cases import survey_segs
from brats_helpers.data.nifti import read_image, read_mask
from brats_helpers.labels import DataError
from tests.volumes import AFFINE, grid, save


@pytest.mark.parametrize("name", ["plain.nii", "packed.nii.gz"])
def test_read_image(tmp_path, name):
    voxels, image = read_image(save(tmp_path / name, np.arange(24).reshape(2, 3, 4)))
    np.testing.assert_array_equal(voxels, np.arange(24).reshape(2, 3, 4))
    assert voxels.dtype == np.int16
    np.testing.assert_array_equal(image.affine, AFFINE)
    assert nifti.spacing_mm(image) == (1, 1, 1)


def test_the_first_bytes_decide_not_the_name(tmp_path):
    plain = save(tmp_path / "a.nii", grid())
    packed = tmp_path / "b.nii"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    unpacked = tmp_path / "c.nii.gz"
    unpacked.write_bytes(plain.read_bytes())
    for path in (packed, unpacked):
        np.testing.assert_array_equal(read_image(path)[0], grid())


@pytest.mark.parametrize("name", ["plain.nii", "packed.nii.gz"])
@pytest.mark.parametrize("kept", [0, 2, 200, 0.9])
def test_truncated_files(tmp_path, name, kept):
    noise = np.random.default_rng(0).integers(0, 30000, (9, 9, 9))
    path = save(tmp_path / name, noise)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(kept * len(raw)) if kept < 1 else kept])
    with pytest.raises(DataError, match=rf"{name} (cannot be read as NIfTI|is truncated).*again"):
        read_image(path)


def test_a_plain_file_cut_in_its_voxels_says_how_much_is_missing(tmp_path):
    path = save(tmp_path / "a.nii", grid())  # 352 bytes of header, 24 voxels of 2 bytes
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="390 bytes, its header promises 400"):
        read_image(path)


def test_a_damaged_packed_file(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 30000, (9, 9, 9)))
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    with pytest.raises(DataError, match="cannot be read as NIfTI"):
        read_image(path)


def test_what_is_no_nifti(tmp_path):
    (tmp_path / "a.nii").write_text("<html>Sign in to download</html>" * 100)
    with pytest.raises(DataError, match="a.nii cannot be read as NIfTI"):
        read_image(tmp_path / "a.nii")
    with pytest.raises(DataError, match="b.nii cannot be read as NIfTI"):
        read_image(tmp_path / "b.nii")


@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (2, 3), (2, 0, 4), (2,)])
def test_other_than_three_axes(tmp_path, shape):
    with pytest.raises(DataError, match=r"has shape \(2,.*expected three axes"):
        read_image(save(tmp_path / "a.nii", np.zeros(shape)))


# ---- Orientation

ORIENTATIONS = [
    "".join(codes) for axes in itertools.permutations(["LR", "AP", "SI"]) for codes in itertools.product(*axes)
]


def turned(image, codes):
    """The same anatomy stored along other axes, by nibabel alone."""
    wanted = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))


def oblique(spacing=(0.9, 1.1, 2.5)):
    """A rotation by 20 degrees, without shears, that leaves LPS the closest orientation."""
    c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
    affine = np.diag([-1.0, -1, 1, 1]) @ np.array([[c, -s, 0, 3], [s, c, 0, -70], [0, 0, 1, 12], [0, 0, 0, 1]])
    return affine @ np.diag([*spacing, 1])


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("affine", [AFFINE, oblique()], ids=["straight", "oblique"])
def test_any_orientation_is_read_as_lps_and_written_back_as_it_was(tmp_path, codes, affine):
    stored = nib.Nifti1Image(np.random.default_rng(0).choice([0, 1, 2, 4], (4, 5, 6)).astype(np.uint8), affine)
    other = turned(stored, codes)
    other.set_qform(other.affine, 2)
    other.set_sform(other.affine, 1)
    nib.save(other, tmp_path / "seg.nii.gz")
    voxels, image = read_image(tmp_path / "seg.nii.gz")
    np.testing.assert_array_equal(voxels, stored.dataobj)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    assert nifti.spacing_mm(image) == pytest.approx(nifti.spacing_mm(stored), abs=1e-5)

    like = nifti.read_nifti(tmp_path / "seg.nii.gz")
    nifti.write_mask(tmp_path / "again.nii.gz", read_mask(tmp_path / "seg.nii.gz", "brats2020"), like)
    again = nib.load(tmp_path / "again.nii.gz")
    np.testing.assert_array_equal(again.dataobj, other.dataobj)
    np.testing.assert_array_equal(again.affine, like.affine)
    for form in ("get_qform", "get_sform"):
        written, code = getattr(again.header, form)(coded=True)
        expected, expected_code = getattr(like.header, form)(coded=True)
        np.testing.assert_allclose(written, expected, atol=1e-4)
        assert code == expected_code


# ---- Headers


@pytest.mark.parametrize("more", [(1,), (1, 1)])
def test_further_axes_of_length_one_are_dropped(tmp_path, more):
    path = save(tmp_path / "a.nii.gz", grid().reshape(2, 3, 4, *more))
    np.testing.assert_array_equal(read_image(path)[0], grid())
    like = nifti.read_nifti(path)
    assert [code for code, _ in nifti.grid_of(like).remarks] == ["fourth-axis"]
    nifti.write_mask(tmp_path / "b.nii.gz", read_mask(path, "brats2020"), like)
    assert nib.load(tmp_path / "b.nii.gz").shape == (2, 3, 4)


def test_one_channel_of_a_file_of_four_axes(tmp_path):
    channels = np.arange(48).reshape(2, 3, 4, 2)
    path = save(tmp_path / "a.nii.gz", channels, affine=np.diag([1.0, -1, 1, 1]))  # R, not L
    np.testing.assert_array_equal(read_image(path, channel=1)[0], channels[::-1, ..., 1])
    nifti.write_mask(tmp_path / "b.nii.gz", np.ones((2, 3, 4), np.uint8), nifti.read_nifti(path))
    assert nib.load(tmp_path / "b.nii.gz").shape == (2, 3, 4)
    with pytest.raises(DataError, match="a.nii.gz has shape .*3 modalities or more"):
        read_image(path, channel=2)


def test_nifti_2(tmp_path):
    nib.save(nib.Nifti2Image(grid().astype(np.int16), AFFINE), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii.gz")[0], grid())


@pytest.mark.parametrize("pair", [nib.Nifti1Pair, nib.Nifti2Pair])
def test_half_of_a_pair_is_named_as_such(tmp_path, pair):
    nib.save(pair(np.zeros((20, 20, 20), np.int16), AFFINE), tmp_path / "a.img")
    (tmp_path / "a.hdr").rename(tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"a.nii (is half of a .hdr/.img pair|is truncated)"):
        read_image(tmp_path / "a.nii")


def save_forms(path, qform, sform):
    """Write a volume whose header holds these two affines as they are."""
    raw = nib.Nifti1Image(grid().astype(np.uint8), AFFINE).to_bytes()
    header = nib.Nifti1Header(raw[:348])
    header["sform_code"], header["qform_code"] = 2, 0
    if qform is not None:
        header.set_qform(qform, 1)
    for axis, row in zip("xyz", sform, strict=False):
        header[f"srow_{axis}"] = row
    path.write_bytes(header.binaryblock + raw[348:])


FLAT = AFFINE * [[1], [1], [0], [1]]


@pytest.mark.parametrize("sform", [FLAT, np.full((4, 4), np.nan), AFFINE * 1e-9], ids=["flat", "nan", "tiny"])
def test_a_singular_sform_gives_way_to_the_qform(tmp_path, sform):
    save_forms(tmp_path / "a.nii", AFFINE, sform)
    voxels, image = read_image(tmp_path / "a.nii")
    np.testing.assert_array_equal(voxels, grid())
    np.testing.assert_allclose(image.affine, AFFINE)
    like = nifti.read_nifti(tmp_path / "a.nii")
    assert [code for code, _ in nifti.grid_of(like).remarks] == ["singular-affine"]
    nifti.write_mask(tmp_path / "b.nii", read_mask(tmp_path / "a.nii", "brats2020"), like)
    np.testing.assert_allclose(nib.load(tmp_path / "b.nii").affine, AFFINE)
    save_forms(tmp_path / "c.nii", None, sform)
    with pytest.raises(DataError, match="c.nii has a singular affine"):
        read_image(tmp_path / "c.nii")


def test_a_qform_elsewhere_is_said_and_not_passed_on(tmp_path):
    moved = AFFINE + np.eye(4, k=3) * 10  # 10 mm to the right
    save_forms(tmp_path / "a.nii", moved, AFFINE)
    like = nifti.read_nifti(tmp_path / "a.nii")
    ((code, text),) = nifti.grid_of(like).remarks
    assert code == "qform-sform" and "up to 10 mm apart" in text and "(10, 0, 0) mm" in text
    nifti.write_mask(tmp_path / "b.nii", read_mask(tmp_path / "a.nii", "brats2020"), like)
    header = nib.load(tmp_path / "b.nii").header
    np.testing.assert_allclose(header.get_qform(), AFFINE)
    np.testing.assert_allclose(header.get_sform(), AFFINE)
    assert (header["qform_code"], header["sform_code"]) == (1, 2)


def test_a_header_without_orientation_is_said(tmp_path):
    image = nib.Nifti1Image(grid().astype(np.uint8), None)
    image.to_filename(tmp_path / "a.nii")
    assert [code for code, _ in nifti.grid_of(nifti.read_nifti(tmp_path / "a.nii")).remarks] == ["no-orientation"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (AFFINE + np.eye(4, k=3) * 0.06, r"up to 0.06 mm apart; origins differ by \(0.06, 0, 0\) mm"),
        (AFFINE * [[1], [-1], [1], [1]], "axes LAS against LPS"),
        (AFFINE + np.diag([0.0004, 0, 0, 0]), "up to 0.0956 mm apart; axis directions by up to 0.0004 mm a voxel"),
    ],
)
def test_a_difference_of_affines_is_put_in_words(other, said):
    """Rounded to three decimals the last two pairs would look the same."""
    shape = (240, 240, 155)
    assert not nifti.same_place(other, AFFINE, shape)
    assert re.search(said, nifti.difference(other, AFFINE, shape))


# ---- Writing


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
@pytest.mark.parametrize(("numbering", "stored"), [("2020", (0, 1, 2, 4)), ("2023", (0, 1, 2, 3))])
def test_round_trip(tmp_path, dtype, numbering, stored):
    affine = np.array([[-0.9, 0.1, 0, 3], [0.1, -1.1, 0, 239], [0, 0, 2.5, -7], [0, 0, 0, 1]])
    like = nib.Nifti1Image(np.zeros((2, 3, 4), dtype), affine)
    like.header["descrip"] = b"as it came"
    like.header.set_xyzt_units("mm", "sec")
    like.header.set_slope_inter(2, 5)
    like.set_sform(affine, code=4)
    like.set_qform(np.diag([-0.9, -1.1, 2.5, 1]), code=1)
    classes = np.resize(np.arange(4, dtype=np.uint8), (2, 3, 4))
    path = tmp_path / "a_seg.nii.gz"
    nifti.write_mask(path, classes, like, numbering=numbering)

    np.testing.assert_array_equal(read_mask(path, "brats2020"), classes)
    again, image = nifti.read_seg(path, "brats2020")
    np.testing.assert_array_equal(again, classes)
    raw = nib.load(path)
    np.testing.assert_array_equal(np.asanyarray(raw.dataobj), np.array(stored)[classes])
    np.testing.assert_array_equal(image.affine, like.affine)
    assert (raw.header["sform_code"], raw.header["qform_code"]) == (
        4,
        0,
    )  # the qform lay elsewhere, and cannot hold shears
    assert raw.header.get_xyzt_units() == ("mm", "sec")
    assert raw.header["descrip"].item() == b"as it came"
    assert raw.get_data_dtype() == (np.uint8 if dtype == np.float32 else dtype)  # no float label map
    assert (raw.dataobj.slope, raw.dataobj.inter) == (1, 0)
    assert nifti.spacing_mm(image) == pytest.approx(nifti.spacing_mm(like))


def test_a_second_reader_sees_the_same(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: no second reader")
    classes = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    like = nib.Nifti1Image(np.zeros((5, 6, 7), np.int16), AFFINE)
    nifti.write_mask(tmp_path / "a.nii.gz", classes, like)
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, labels.classes_to_labels(classes))
    assert image.GetOrigin() == (0, -239, 0)  # SimpleITK's axes: x and y the other way round
    assert image.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)


# ---- Real patients


@pytest.mark.parametrize(
    ("case", "voxels"),
    [
        ("brats_2013_pat0001_1", (27_189, 53_050, 31_485)),
        ("brats_2013_pat0002_1", (1_106, 53_736, 8_219)),
        ("brats_2013_pat0003_1", (4_414, 148_264, 21_250)),
    ],
)
def test_voxels_of_real_patients(real_patients, case, voxels):
    classes, image = nifti.read_seg(survey_segs(real_patients)[0][case], "brats2020")
    assert classes.shape == (240, 240, 155)
    assert nifti.spacing_mm(image) == (1, 1, 1)
    assert tuple(np.bincount(classes.ravel(), minlength=4)[1:]) == voxels
