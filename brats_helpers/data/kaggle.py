"""Downloads through Kaggle's own packages, which are imported only when needed and only inside `tamed`.

`kaggle` authenticates when imported and exits without credentials. Neither it nor `kagglehub` limits how long it waits,
and both print signed addresses. The suite itself never reads the credentials.
"""

import contextlib
import importlib
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlsplit

from brats_helpers.data.archives import DAMAGE, FULL, MAKE_ROOM, Damaged, calm_bar
from brats_helpers.labels import DataError

_PROBE_S = 12  # for Kaggle's first answer, name resolution included
_LIMITS_S = (5, 60)  # of each request: to connect, and between two bytes
_PAUSE_S = 2  # after an attempt that brought nothing


@dataclass(frozen=True)
class KaggleSet:
    """A data set on Kaggle: `owner/name`, the pattern of its files' names, and the bytes of the zip plus contents."""

    handle: str
    pattern: str
    disk_bytes: int

    @property
    def name(self) -> str:
        """The data set's name without its owner; Kaggle mounts it under this."""
        return self.handle.split("/")[1]

    @property
    def url(self) -> str:
        """The page where a person reads the terms and downloads by hand."""
        return f"https://www.kaggle.com/datasets/{self.handle}"


def in_colab() -> bool:
    """Whether this is Google Colab, where kagglehub mounts data sets instead of downloading them."""
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def credentials() -> str | None:
    """Where the Kaggle packages will find credentials: a variable's name or a file, never its content."""
    if os.environ.get("KAGGLE_API_TOKEN"):
        return "KAGGLE_API_TOKEN"
    if os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"):
        return "KAGGLE_USERNAME and KAGGLE_KEY"
    home = Path("~/.kaggle").expanduser()
    xdg = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "kaggle"
    config = Path(os.environ.get("KAGGLE_CONFIG_DIR") or home)
    files = [home / name for name in ("access_token", "access_token.txt", "credentials.json")]
    files += [folder / "kaggle.json" for folder in (config, home, xdg)]
    return next((str(file) for file in files if file.is_file()), None)


def clients() -> list[str]:
    """The packages to try in turn: `kaggle` with an account, `kagglehub` without one and first in Colab.

    The variable BRATS_KAGGLE_CLIENT names the only one to use.
    """
    if "google.colab" in sys.modules and "KAGGLE_API_TOKEN" not in os.environ:
        with contextlib.suppress(Exception):  # Colab has errors of its own: no such secret, access not granted
            os.environ["KAGGLE_API_TOKEN"] = importlib.import_module("google.colab.userdata").get("KAGGLE_API_TOKEN")
    if asked := os.environ.get("BRATS_KAGGLE_CLIENT"):
        if asked not in ("kaggle", "kagglehub"):
            raise DataError(f"BRATS_KAGGLE_CLIENT is {asked!r}, expected kaggle or kagglehub. Correct it or unset it.")
        return [asked]
    account = ["kaggle"] if credentials() else []
    return ["kagglehub", *account] if in_colab() else account or ["kagglehub"]


@contextlib.contextmanager
def tamed() -> Iterator[None]:
    """Run Kaggle's packages with a time limit on every request, without their prints, and with stdin out of reach.

    Their progress bars remain; where nobody watches, they print a line a minute.
    """
    import requests
    from tqdm import tqdm

    send = requests.Session.send

    def send_with_limit(session, request, **settings):
        return send(session, request, **settings | {"timeout": _LIMITS_S})

    with (
        patch.object(requests.Session, "send", send_with_limit),
        patch.object(tqdm, "__init__", partialmethod(tqdm.__init__, **calm_bar())),
        patch.object(sys, "stdin", io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


def kaggle_api():
    """Kaggle's own client, authenticated; call it within `tamed`. It exits the process if no credentials are valid."""
    import kagglesdk.kaggle_client as sdk
    from kagglesdk.kaggle_env import KaggleEnv, get_env
    from kagglesdk.kaggle_http_client import KaggleHttpClient

    if get_env() is not KaggleEnv.PROD:  # kaggle 2.2 asks for PROD whatever KAGGLE_API_ENVIRONMENT says
        sdk.KaggleHttpClient = lambda env, *args, **kwargs: KaggleHttpClient(get_env(), *args, **kwargs)
    from kaggle.api.kaggle_api_extended import KaggleApi

    api = KaggleApi()
    api.authenticate()
    return api


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind a failure of Kaggle's packages, or None."""
    if isinstance(error, SystemExit):
        return 401  # how the kaggle client ends when it can use none of the credentials
    # The client words some refusals as ValueError, raised while it handles the response's own error.
    responses = (getattr(one, "response", None) for one in (error, error.__context__))
    return next((response.status_code for response in responses if response is not None), None)


def broke_off(error: BaseException) -> bool:
    """Whether the connection failed or Kaggle was busy, so that the same request may work later."""
    import requests

    status = status_of(error)
    if status is not None:
        return status >= 500 or status == 429
    return isinstance(error, (requests.RequestException, ConnectionError, TimeoutError))


def download(client: str, wanted: KaggleSet, place: Path) -> Path:
    """Download a data set with one of Kaggle's packages, resuming for as long as anything arrives.

    Args:
        client: `kaggle` or `kagglehub`.
        wanted: the data set.
        place: a folder for the download; a later call resumes from it.

    Returns:
        The zip inside `place` (kaggle), or a folder with its contents: inside `place`, or a mount (kagglehub).

    Raises:
        DataError: what happened and what to do. It never quotes the client, whose messages may hold signed addresses.
    """
    fetch = _with_kaggle if client == "kaggle" else _with_kagglehub
    fruitless = 0
    while True:
        before = bytes_in(place)
        try:
            with tamed():
                return fetch(wanted.handle, place)
        except ImportError:
            raise DataError(f"the package {client} is not installed. pip install {client}") from None
        except (Exception, SystemExit) as error:
            fruitless = 0 if bytes_in(place) > before else fruitless + 1
            if fruitless == 2 or not broke_off(error):
                raise _explained(error, client, wanted, place) from None
        print(f"{wanted.name}: the connection broke after {bytes_in(place) / 1e9:.2f} GB, resuming", flush=True)
        time.sleep(_PAUSE_S * (1 + fruitless))


def reach() -> None:
    """Raise `DataError` unless Kaggle answers soon. A thread sends the request: name resolution has no time limit."""
    try:
        import requests
        from kagglesdk.kaggle_env import get_endpoint, get_env
    except ImportError:
        raise DataError("Kaggle's packages are not installed. pip install kaggle kagglehub") from None
    endpoint, answers = get_endpoint(get_env()), []

    def ask():
        with contextlib.suppress(requests.RequestException):
            answers.append(requests.head(endpoint, timeout=_LIMITS_S[0]))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PROBE_S)
    if not answers:
        host = urlsplit(endpoint).netloc
        raise DataError(f"no answer from {host}. Is there a network? Does a firewall allow the connection?")


def _with_kaggle(handle: str, place: Path) -> Path:
    archive, part = place / "archive.zip", place / "part" / f"{handle.split('/')[1]}.zip"
    if not archive.exists():
        kaggle_api().dataset_download_files(handle, path=part.parent, quiet=False)
        os.replace(part, archive)
    return archive


def _with_kagglehub(handle: str, place: Path) -> Path:
    with patch.dict(os.environ, KAGGLEHUB_CACHE=str(place)):
        import kagglehub

        return Path(kagglehub.dataset_download(handle))


def bytes_in(place: Path) -> int:
    """Bytes of all files in a folder that may not exist."""
    return sum(path.lstat().st_size for path in place.rglob("*") if path.is_file())


def _explained(error: BaseException, client: str, wanted: KaggleSet, place: Path) -> DataError:
    """The error to raise for a failed download."""
    status, found = status_of(error), credentials()
    account = "Kaggle asks for an account (401). Set KAGGLE_API_TOKEN to a token from https://www.kaggle.com/settings."
    if found:
        account = (
            f"the credentials in {found} were not accepted (401). Put a new token there, from"
            " https://www.kaggle.com/settings, or remove them: a public data set needs none."
        )
    refusals = {
        401: account,
        403: f"access refused (403). Sign in at {wanted.url}, accept its terms if it asks, then run again.",
        404: f"Kaggle has no {wanted.handle} (404): renamed or withdrawn? See {wanted.url}, or give a copy by --data.",
    }
    if status is not None:
        busy = f"Kaggle answered with an error ({status}). Run again later; what has arrived is kept."
        return DataError(refusals.get(status, busy))
    if broke_off(error):
        return DataError("the connection broke, and broke again after resuming. Run again to resume.")
    if isinstance(error, OSError):
        full = error.errno in FULL
        return DataError(
            f"the disk of {place.parent} filled up. {MAKE_ROOM}" if full else f"the client failed ({error})."
        )
    unusable = isinstance(error, ValueError) and bytes_in(place)  # kagglehub: no archive at all
    if unusable or isinstance(error, DAMAGE) or type(error).__name__ == "DataCorruptionError":  # kagglehub: wrong MD5
        return Damaged("the downloaded archive is damaged and was removed. Run again to fetch it again.")
    return DataError(f"the client failed ({type(error).__name__}). Download by hand, see below.")
