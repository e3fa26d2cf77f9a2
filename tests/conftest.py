"""What every test may use."""

import os
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.data import kaggle as kaggle_data
from brats_helpers.data import sources
from brats_helpers.labels import MODALITIES
from tests.kaggle_server import PORT, TOKEN, FakeKaggle, serve

ROOT = Path(__file__).parents[1]

os.environ.setdefault("MPLBACKEND", "Agg")


def pytest_collection_modifyitems(items):
    """What takes the longest comes first, so that it does not run on alone at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_notebooks.py", "test_folds.py"))


@pytest.fixture(scope="session")
def real_patients() -> Path:
    """The folder of real patients beside the checkout; a test that needs it is skipped where it is not."""
    folder = ROOT.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip(f"no real patients at {folder}")
    return folder


def write_tiny_case(folder: Path, case_id: str, *, seed: int, modalities=MODALITIES, labelled=True) -> Path:
    """Write one tiny patient, 48 x 56 x 20 voxels: an ellipsoid brain, an egg of a tumour, each tissue its own grey."""
    random = np.random.default_rng(seed)
    shape = (48, 56, 20)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    brain = (x / 0.7) ** 2 + (y / 0.8) ** 2 + (z / 0.8) ** 2 < 1
    cx, cy = random.uniform(-0.25, 0.25, 2)
    distance = ((x - cx) ** 2 + (y - cy) ** 2 + (z / 1.5) ** 2) ** 0.5
    labels = np.select([~brain, distance < 0.12, distance < 0.22, distance < 0.35], [0, 1, 4, 2], 0).astype(np.uint8)
    greys = {
        "flair": (300, 500, 800, 700),
        "t1": (400, 250, 300, 350),
        "t1ce": (400, 250, 900, 380),
        "t2": (300, 900, 600, 700),
    }
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[1, 3] = 55
    place = folder / case_id
    place.mkdir(parents=True)
    for name in modalities:
        grey = np.array(greys[name])[np.where(labels == 4, 3, labels)] + random.normal(0, 20, shape)
        nib.save(nib.Nifti1Image((grey * brain).astype(np.int16), affine), place / f"{case_id}_{name}.nii.gz")
    if labelled:
        nib.save(nib.Nifti1Image(labels, affine), place / f"{case_id}_seg.nii.gz")
    return place


@pytest.fixture(scope="session")
def tiny_patients(tmp_path_factory) -> Path:
    """A folder of four tiny labelled patients, `Tiny_0` to `Tiny_3`."""
    folder = tmp_path_factory.mktemp("tiny")
    for k in range(4):
        write_tiny_case(folder, f"Tiny_{k}", seed=k)
    return folder


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without credentials or mounts, whose Kaggle is port 7777 and which can reach nothing else."""
    for name in [name for name in os.environ if name.startswith(("KAGGLE", "COLAB", "TBE_", "JPY_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "localhost,127.0.0.1")
    monkeypatch.setattr(sources, "MOUNT", tmp_path / "input")
    monkeypatch.setattr(kaggle_data, "_PAUSE_S", 0.1)
    small = {short: replace(one, disk_bytes=0) for short, one in sources.KAGGLE_SETS.items()}
    monkeypatch.setattr(sources, "KAGGLE_SETS", small)


@pytest.fixture
def account(machine, monkeypatch):
    """Credentials for Kaggle."""
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)


@pytest.fixture
def port():
    """Port 7777, the only one that Kaggle's clients take for a test, for this test alone."""
    fcntl = pytest.importorskip("fcntl")
    with open(Path(tempfile.gettempdir()) / "brats-tests-port-7777.lock", "a") as lock:
        for _ in range(1200):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            pytest.skip("other tests have held port 7777 for two minutes")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", PORT)) == 0:
                pytest.skip("port 7777 is taken by something else")
        yield


@pytest.fixture
def kaggle(machine, port):
    """Kaggle on loopback."""
    fake = FakeKaggle()
    server = serve(fake)
    yield fake
    server.shutdown()
    server.server_close()
