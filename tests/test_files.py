"""Files are complete, even with other writers and after kills."""

import ast
import os
import subprocess
import sys
import time

import pytest

from brats_helpers import files
from brats_helpers.files import part_folder, sweep, whole_file, whole_folder
from tests.conftest import ROOT


def leave_part(folder, processes=""):
    """Leave in `folder` what a writer killed in the middle leaves, be it one of other `processes`."""
    code = (
        "import os, sys; from pathlib import Path; from brats_helpers import files\n"
        "files.processes = lambda own=files.processes(): sys.argv[2] or own\n"
        "with files.whole_file(Path(sys.argv[1], 'torn')) as file: file.write('half'), os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, folder, processes], check=False)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_at_once_leave_what_one_of_them_wrote(tmp_path):
    path = tmp_path / "splits.json"
    with whole_file(path) as slow:
        slow.write("slow, ")
        with whole_file(path) as fast:
            fast.write("fast")
        assert path.read_text() == "fast"
        slow.write("but whole")
    assert path.read_text() == "slow, but whole" and names(tmp_path) == [path.name]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(OSError, match="No space"), whole_file(tmp_path / "a.bin", "wb") as file:
        file.write(b"ne")
        raise OSError("No space left on device")
    assert (tmp_path / "a.bin").read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_the_next_write_removes_what_a_killed_writer_left(tmp_path):
    leave_part(tmp_path)
    assert names(tmp_path)[0].startswith(files.PART)
    with whole_file(tmp_path / "last.pt") as file:
        file.write("whole")
    assert names(tmp_path) == ["last.pt"]


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "a") as file:
            file.write("")
        with part_folder(tmp_path) as folder:
            modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "a", folder)]
    finally:
        os.umask(before)
    assert modes == [0o640, 0o750]


@pytest.mark.parametrize(
    ("where", "what"), [("platform.node", lambda: "node-gpu"), ("os.readlink", lambda path: "pid:[1]")]
)
def test_folders_of_another_machine_or_container_stay_for_a_day(tmp_path, monkeypatch, where, what):
    """There the same process number is somebody else."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(f"brats_helpers.files.{where}", what)
        files.processes.cache_clear()
        leave_part(tmp_path, files.processes())
    files.processes.cache_clear()
    (tmp_path / ".part-node-gpu-12-x").mkdir()  # named otherwise, as by an older release
    sweep(tmp_path)
    assert len(names(tmp_path)) == 2
    for folder in tmp_path.iterdir():
        os.utime(folder, (time.time() - files._STALE_S - 60,) * 2)
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_a_living_writer_is_not_swept(tmp_path):
    with part_folder(tmp_path) as folder:
        sweep(tmp_path)
        assert folder.is_dir()
    sweep(tmp_path / "nowhere")


def test_json_is_utf_8_in_any_locale(tmp_path):
    code = (
        "import sys; from pathlib import Path; from brats_helpers.files import read_json, write_json\n"
        "path = Path(sys.argv[1])\n"
        "write_json(path, {'origin': 'T\\u00fcbingen\\u2019s'}); print(ascii(read_json(path)))"
    )
    ascii_locale = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, tmp_path / "a.json"]
    done = subprocess.run(command, env=ascii_locale, capture_output=True, text=True)
    assert done.stdout == "{'origin': 'T\\xfcbingen\\u2019s'}\n", done.stderr
    assert "Tübingen’s" in (tmp_path / "a.json").read_bytes().decode("utf-8")


def test_a_missing_file_gives_the_default_and_a_torn_one_is_named(tmp_path):
    assert files.read_json(tmp_path / "none.json", {}) == {}
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="torn.json is not JSON"):
        files.read_json(tmp_path / "torn.json", {})


# --- encodings


def in_the_locales_encoding(source):
    """The lines of calls that read or write text and do not say in which encoding."""
    for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        named = {keyword.arg for keyword in call.keywords}
        mode = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else "r"
        text = {
            "read_text": not call.args,
            "write_text": len(call.args) < 2,
            "open": isinstance(call.func, ast.Name) and "b" not in str(mode) and "devnull" not in ast.unparse(call),
        }
        if text.get(name, "text" in named) and "encoding" not in named:
            yield call.lineno


def test_no_text_is_read_or_written_in_the_locales_encoding():
    sources = {str(path): path.read_text("utf-8") for path in (ROOT / "brats_helpers").rglob("*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in files.read_json(path)["cells"] if cell["cell_type"] == "code"]
        sources |= {f"{path}, {cell['id']}": "".join(cell["source"]) for cell in cells}
    assert {place: lines for place, source in sources.items() if (lines := [*in_the_locales_encoding(source)])} == {}


def test_a_folder_takes_its_name_only_when_it_is_complete(tmp_path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "old").touch()
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "predictions") as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert names(tmp_path / "predictions") == ["old"] and names(tmp_path) == ["predictions"]
    with whole_folder(tmp_path / "predictions") as folder:
        (folder / "new").touch()
    assert names(tmp_path / "predictions") == ["new"] and names(tmp_path) == ["predictions"]
