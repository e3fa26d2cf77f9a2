"""Which of Kaggle's packages is used, with which credentials, and within which bounds."""

import subprocess
import sys
import time
import types

import pytest

from brats_helpers.data import kaggle as kaggle_data
from brats_helpers.data.kaggle import broke_off, clients, credentials, status_of, tamed
from brats_helpers.labels import DataError
from tests.kaggle_server import PORT

pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    monkeypatch.delenv("BRATS_KAGGLE_CLIENT", raising=False)


def test_importing_imports_no_client():
    code = (
        "import sys, brats_helpers.data.sources, brats_helpers.suite.kaggle\n"
        "print([m for m in sys.modules if m.startswith(('kaggle', 'requests'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_credentials_are_named_and_never_shown(tmp_path, monkeypatch):
    assert credentials() is None
    file = tmp_path / "home" / ".kaggle" / "kaggle.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"username": "me", "key": "secret"}')
    assert credentials() == str(file)
    monkeypatch.setenv("KAGGLE_USERNAME", "me")
    assert credentials() == str(file)  # half a pair is none
    monkeypatch.setenv("KAGGLE_KEY", "secret")
    assert credentials() == "KAGGLE_USERNAME and KAGGLE_KEY"
    monkeypatch.setenv("KAGGLE_API_TOKEN", "secret")
    assert credentials() == "KAGGLE_API_TOKEN"


def test_the_account_and_colab_choose_the_client(monkeypatch):
    assert clients() == ["kagglehub"]
    monkeypatch.setenv("KAGGLE_API_TOKEN", "token")
    assert clients() == ["kaggle"]
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    assert clients() == ["kagglehub", "kaggle"]
    for name in ("kaggle", "kagglehub"):
        monkeypatch.setenv("BRATS_KAGGLE_CLIENT", name)
        assert clients() == [name]
    monkeypatch.setenv("BRATS_KAGGLE_CLIENT", "curl")
    with pytest.raises(DataError, match="BRATS_KAGGLE_CLIENT is 'curl', expected kaggle or kagglehub"):
        clients()


def test_a_token_in_colabs_secrets_is_used_if_its_owner_allows_it(monkeypatch):
    secrets = types.ModuleType("google.colab.userdata")
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setitem(sys.modules, "google.colab.userdata", secrets)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "")
    monkeypatch.delenv("KAGGLE_API_TOKEN")

    def refused(name):
        raise PermissionError(name)

    secrets.get = refused
    assert clients() == ["kagglehub"]
    secrets.get = {"KAGGLE_API_TOKEN": "KGAT_secret"}.get
    assert clients() == ["kagglehub", "kaggle"] and credentials() == "KAGGLE_API_TOKEN"


def test_the_packages_run_in_silence_and_cannot_close_stdin(capfd):
    import requests
    from tqdm import tqdm

    before = (requests.Session.send, vars(tqdm)["__init__"], sys.stdin)
    with pytest.raises(SystemExit) as caught, tamed():
        print("https://storage/archive?signature=signed")
        exit(1)  # as the kaggle client does; it closes stdin
    assert (requests.Session.send, vars(tqdm)["__init__"], sys.stdin) == before and not sys.stdin.closed
    assert status_of(caught.value) == 401
    assert capfd.readouterr() == ("", "")


def test_every_request_of_the_packages_has_a_time_limit(kaggle, monkeypatch):
    import requests

    kaggle.silent = True
    monkeypatch.setattr(kaggle_data, "_LIMITS_S", (1, 0.2))
    for limit in (None, 300):
        began = time.monotonic()
        with pytest.raises(requests.RequestException) as caught, tamed():
            requests.get(f"http://localhost:{PORT}", timeout=limit)
        assert time.monotonic() - began < 2 and broke_off(caught.value)


def test_even_a_name_that_is_never_resolved_ends_the_question(monkeypatch):
    import requests

    monkeypatch.setattr(kaggle_data, "_PROBE_S", 0.2)
    monkeypatch.setattr(requests, "head", lambda *_, **__: time.sleep(5))
    began = time.monotonic()
    with pytest.raises(DataError, match="no answer"):
        kaggle_data.reach()
    assert time.monotonic() - began < 4


def test_a_busy_server_and_a_broken_connection_may_be_asked_again():
    import requests

    for status, again in ((401, False), (404, False), (429, True), (503, True)):
        response = requests.Response()
        response.status_code = status
        assert broke_off(requests.HTTPError(response=response)) == again
    assert broke_off(requests.ConnectionError()) and broke_off(TimeoutError())
    assert not broke_off(OSError(28, "No space left on device")) and not broke_off(KeyError())
