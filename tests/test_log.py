"""The log's marks, on terminals of any encoding."""

import os
import subprocess
import sys

import pytest

from brats_helpers import log
from tests.conftest import ROOT, write_tiny_case

LATIN = {"PYTHONIOENCODING": "latin-1"}
PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def python(*arguments, **environ):
    environ = os.environ | {"PYTHONPATH": str(ROOT)} | environ
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environ, capture_output=True)


@pytest.mark.parametrize("environ", [LATIN, PLAIN_C])
def test_marks_become_words_if_the_terminal_lacks_them(environ):
    say = "from brats_helpers.log import *\ndone('M\\xfcller \\u2229')\nwarn('w')\nfail('f')\ntiming('t', 1)"
    done = python("-c", say, **environ)
    name = "Müller" if environ is LATIN else "M?ller"
    expected = f"[ok] {name} ?\n[warning] w\n[error] f\n[time] t: 1.0 s\n"
    assert (done.stdout.decode("latin-1"), done.stderr) == (expected, b"")


def test_marks_stay_where_the_terminal_has_them():
    said = python("-c", "from brats_helpers.log import done\ndone('\\xfc')", PYTHONIOENCODING="utf-8").stdout
    assert said == "✅ ü\n".encode()


@pytest.mark.parametrize("environ", [LATIN, PLAIN_C])
def test_check_reads_a_path_with_umlaut_space_and_apostrophe_in_any_locale(tmp_path, environ):
    write_tiny_case(tmp_path / "Müller's data", "P ü", seed=0)
    done = python("-m", "brats_helpers", "check", str(tmp_path / "Müller's data"), **environ)
    assert done.returncode == 0 and done.stderr == b"" and b"1 patients: 0 with errors" in done.stdout, done


@pytest.mark.parametrize("watched, notebook, terminal, shown", [(1, 1, 0, 1), (1, 0, 0, 0), (1, 0, 1, 1), (0, 1, 1, 0)])
def test_a_bar_shows_where_a_person_watches_and_the_items_are_all_there(
    monkeypatch, capsys, watched, notebook, terminal, shown
):
    monkeypatch.setattr(log, "watched", lambda: bool(watched))
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert list(log.progress(iter("abc"), what="preparing", total=3, terminal=bool(terminal))) == ["a", "b", "c"]
    assert ("preparing" in "".join(capsys.readouterr())) == bool(shown)
