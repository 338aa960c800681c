"""Where results are written: what is there is refused before any work, kept whole, or replaced at once."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from osrm_peft.io import places
from osrm_peft.io.json import write_json
from osrm_peft.io.manifest import MANIFEST, check_replaceable, new_folder
from osrm_peft.io.places import FULL, alone_in, beside, check_file, check_folder, clean_up, new_file, put_in_place
from tests.helpers.places import ODD, plant, state


@pytest.mark.parametrize("kind", [*ODD, "file", "link to a file"])
@pytest.mark.parametrize("below", ["", "below", "far/below"])
def test_a_folder_is_made_where_there_is_nothing_else(tmp_path, kind, below):
    plant(tmp_path / "out", kind)
    before = state(tmp_path)
    for check in (check_folder, lambda path: check_replaceable(path, "merged"), lambda path: write(path, new_folder)):
        with pytest.raises(FileExistsError, match=r"is (a \w+|a link that leads to itself).*name another"):
            check(tmp_path / "out" / below)
    assert state(tmp_path) == before


@pytest.mark.parametrize("kind", [*ODD, "folder", "link to a folder"])
def test_a_file_is_written_where_there_is_no_other_thing(tmp_path, kind):
    plant(tmp_path / "out", kind)
    before = state(tmp_path)
    for check in (check_file, lambda path: write_json(path, {})):
        with pytest.raises(FileExistsError, match=r"is (a \w+|a link that leads to itself).*name another"):
            check(tmp_path / "out")
    assert state(tmp_path) == before


@pytest.mark.parametrize("mask, mode", [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_a_folder_may_be_read_by_those_whom_the_user_lets(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write(tmp_path / "out", new_folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def write(path, way, content="new"):
    if way is new_file:
        with new_file(path) as partial:
            partial.write_text(content)
    else:
        with new_folder(path, "merged") as partial:
            (partial / MANIFEST).write_text(json.dumps({"kind": "merged", "method": content}))


def read(path):
    return json.loads((path / MANIFEST).read_text())["method"] if path.is_dir() else path.read_text()


@pytest.mark.parametrize("way", [new_file, new_folder])
def test_links_are_followed_to_what_is_there_and_to_what_is_not(tmp_path, way):
    (tmp_path / "out").symlink_to("far/behind")  # nothing there yet
    for content in ("first", "second"):
        write(tmp_path / "out", way, content)
        assert (tmp_path / "out").is_symlink() and read(tmp_path / "far/behind") == content
    assert sorted(one.name for one in (tmp_path / "far").iterdir()) == ["behind"]


@pytest.mark.parametrize("check", [check_file, check_folder])
@pytest.mark.parametrize("name", ["n" * 250, "\udcff"])
def test_names_too_long_or_no_utf_8_are_refused_before_any_work(tmp_path, check, name):
    with pytest.raises(
        PermissionError, match=r"cannot be made \((File name too long|its name is no UTF-8)\): name anoth"
    ):
        check(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that even root cannot write to is Linux's")
@pytest.mark.parametrize("below", ["out", "far/out"])
def test_rights_alone_do_not_tell_whether_a_folder_can_be_written_to(below):
    for check in (check_file, check_folder):
        with pytest.raises(PermissionError, match=r"/proc cannot be written to, so /proc/.*out cannot be made"):
            check(f"/proc/{below}")


def test_an_irreplaceable_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match=r"^/ is a file system of its own, .*: name a folder in it"):
        check_replaceable("/", "merged")
    write(tmp_path / "out", new_folder)
    (tmp_path / "out/heads").mkdir()
    for here, out in (("out", "."), ("out/heads", "..")):
        monkeypatch.chdir(tmp_path / here)
        with pytest.raises(FileExistsError, match=r"/out is the folder that this runs in, .*: name a folder in it"):
            check_replaceable(out, "merged")
    monkeypatch.chdir(tmp_path / "out/heads")
    (tmp_path / "out/heads").rmdir()  # where this runs is gone
    write(tmp_path / "out", new_folder, "again")
    assert read(tmp_path / "out") == "again"


@pytest.mark.parametrize("kind", ["merged", "emr", "adapter", "checkpoint"])
@pytest.mark.parametrize(
    "name", ["heads/notes.txt", "heads/b.safetensors", "heads/a.safetensors/x", "README.md/x", "link"]
)
def test_files_of_others_are_found_at_any_depth(tmp_path, kind, name):
    about = {"kind": kind, "inputs": {"a": {"source": "s"}}, "files": [MANIFEST, "heads/a.safetensors"]}
    (tmp_path / "out/heads").mkdir(parents=True)
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(about))
    if kind != "adapter":
        (tmp_path / "out/heads/a.safetensors").touch()
    check_replaceable(tmp_path / "out", kind)
    (tmp_path / "out/heads/a.safetensors").unlink(missing_ok=True)
    place = tmp_path / "out" / name
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(tmp_path) if name == "link" else place.touch()
    with pytest.raises(FileExistsError, match=rf"holds files of others \({name}\)"):
        check_replaceable(tmp_path / "out", kind)


def test_paths_that_are_no_utf_8_are_written_down(tmp_path):
    write_json(tmp_path / "x.json", {"source": "\udcff/a"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"source": "\udcff/a"}


def test_one_process_at_a_time_is_in_a_folder(tmp_path):
    folder = tmp_path / "far/work"
    with alone_in(folder):
        (folder / "mine").touch()
        with pytest.raises(FileExistsError, match=r"another process writes in .*: wait"), alone_in(folder):
            pass
        folder.rename(tmp_path / "done")
        with alone_in(folder):  # a new one of this name
            assert not list(folder.iterdir())
    with alone_in(folder):
        pass


@pytest.mark.parametrize("kind", [*ODD, "file", "link to a folder"])
def test_no_process_is_alone_in_what_is_no_folder(tmp_path, kind):
    plant(tmp_path / "work", kind)
    before = state(tmp_path)
    with pytest.raises(FileExistsError, match=r"/work is no folder, .*: remove it"), alone_in(tmp_path / "work"):
        pass
    assert state(tmp_path) == before


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    tmp_path.chmod(0o500)
    for check in (check_file, check_folder):
        with pytest.raises(PermissionError, match="cannot be written to"):
            check(tmp_path / "out")


@pytest.mark.parametrize("way", [new_file, new_folder])
@pytest.mark.parametrize("error", [OSError(FULL[0], "no room"), OSError(FULL[1], "quota"), "safetensors"])
def test_a_full_disk_is_named_with_the_place_and_leaves_what_was_there(tmp_path, way, error):
    from safetensors import SafetensorError

    write(tmp_path / "out", way, "earlier")
    raised = SafetensorError("I/O error: No space left on device (os error 28)") if error == "safetensors" else error
    context = way(tmp_path / "out") if way is new_file else way(tmp_path / "out", "merged")
    with pytest.raises(OSError, match=rf"{tmp_path}/out could not be written; make room, or name another"), context:
        raise raised
    assert read(tmp_path / "out") == "earlier" and [one.name for one in tmp_path.iterdir()] == ["out"]


SCRIPT = """
import os, shutil, signal, sys
from pathlib import Path
from osrm_peft.io import places
from osrm_peft.io.manifest import MANIFEST, new_folder
from osrm_peft.io.places import new_file

out, way, step, at, exchange = sys.argv[1:]
count = 0

def deadly(function, after=False):
    def call(*arguments, **named):
        global count
        count += 1
        if count == int(at) and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = function(*arguments, **named)
        if count == int(at) and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return call

if exchange == "no":
    places._exchange = lambda one, other: False
elif step == "exchanged":
    places._exchange = deadly(places._exchange, after=True)
if step in ("replace", "replaced"):
    Path.replace = deadly(Path.replace, after=step == "replaced")
if step == "rmtree":
    shutil.rmtree = deadly(shutil.rmtree)
with new_file(out) if way == "file" else new_folder(out, "merged") as partial:
    if way == "file":
        partial.write_text("new")
    else:
        (partial / MANIFEST).write_text('{"kind": "merged", "method": "new"}')
    if step == "written":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "step, at, exchange",
    [("written", 0, "yes"), ("exchanged", 1, "yes"), ("rmtree", 1, "yes"), ("written", 0, "no"), ("replace", 1, "no"),
     ("replaced", 1, "no"), ("replaced", 2, "no"), ("rmtree", 1, "no")],
)  # fmt: skip
@pytest.mark.parametrize("way", ["folder", "file"])
def test_a_killed_writer_loses_nothing_and_the_next_one_cleans_up(tmp_path, way, step, at, exchange):
    out, kind = tmp_path / "out", {"folder": new_folder, "file": new_file}[way]
    write(out, kind, "earlier")
    command = [sys.executable, "-c", SCRIPT, out, way, step, str(at), exchange]
    done = subprocess.run(command, capture_output=True, text=True)
    killed = -signal.SIGKILL if way == "folder" or (step, at) not in (("exchanged", 1), ("replaced", 2)) else 0
    assert done.returncode == killed, done.stderr
    between = way == "folder" and (step, at) == ("replaced", 1)  # where two names cannot be exchanged
    assert between or read(out) in ("earlier", "new")
    clean_up(out)
    assert read(out) in ("earlier", "new") and [one.name for one in tmp_path.iterdir()] == ["out"]
    write(out, kind, "next")
    assert read(out) == "next" and [one.name for one in tmp_path.iterdir()] == ["out"]


def test_what_others_are_writing_stays(tmp_path):
    with new_file(tmp_path / "out") as mine:
        mine.write_text("mine")
        with new_file(tmp_path / "out") as other:
            other.write_text("other")
        assert mine.read_text() == "mine"
    assert (tmp_path / "out").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_only_what_writers_of_this_path_left_is_removed(tmp_path):
    kept = [".out.notes.partial", ".out.b.12345678.partial", ".other.12345678.partial", ".out.bak.old", "out.1.partial"]
    for name in kept:
        (tmp_path / name).write_text("theirs")
    (tmp_path / ".out.abcd_123.partial").mkdir()
    (tmp_path / ".out.4321.partial").write_text("of an earlier version")
    os.mkfifo(tmp_path / ".out.77.partial")
    write(tmp_path / "out", new_file)
    assert {one.name for one in tmp_path.iterdir()} == {*kept, "out", ".out.77.partial"}


@pytest.mark.parametrize("name", ["o.t", "o(", "[o]", "o+t"])
def test_names_that_are_patterns_are_names(tmp_path, name):
    (tmp_path / ".oxt.12345678.partial").write_text("theirs")
    (tmp_path / f".{name}.12345678.partial").write_text("left")
    write(tmp_path / name, new_folder)
    assert {one.name for one in tmp_path.iterdir()} == {".oxt.12345678.partial", name}


def test_what_was_left_is_cleaned_up_where_a_result_comes_from_elsewhere(tmp_path):
    write(tmp_path / ".out.12345678.partial/old", new_folder, "earlier")
    write(tmp_path / "made", new_folder, "new")
    put_in_place(tmp_path / "made", tmp_path / "out")
    assert read(tmp_path / "out") == "new" and [one.name for one in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_another_took_for_a_dead_one_s_is_made_again(tmp_path, monkeypatch):
    lock, taken = places._lock, []

    def late(place, wait=False):
        if wait and not taken:
            taken.append(place)
            clean_up(tmp_path / "out")  # before its owner has the lock
            assert not place.exists()
            return None
        return lock(place, wait)

    monkeypatch.setattr(places, "_lock", late)
    write(tmp_path / "out", new_folder)
    assert len(taken) == 1 and [one.name for one in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_what_took_a_file_s_place_meanwhile_stays(tmp_path, kind):
    with pytest.raises(FileExistsError, match="name another"), new_file(tmp_path / "out") as partial:
        partial.write_text("new")
        plant(tmp_path / "out", kind)
    assert stat.S_ISFIFO((tmp_path / "out").lstat().st_mode) == (kind == "fifo") and len(list(tmp_path.iterdir())) == 1


def test_an_earlier_result_of_an_earlier_version_is_put_back_or_named(tmp_path, caplog):
    out, old = tmp_path / "out", tmp_path / ".out.4321.old"
    write(old, new_folder, "earlier")
    clean_up(out)
    assert read(out) == "earlier" and not old.exists() and f"{out} is back" in caplog.text
    write(old, new_folder, "left")
    write(out, new_folder, "new")
    assert read(out) == "new" and read(old) == "left" and f"{old} is an earlier out" in caplog.text


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_another_s_place(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(places, "_exchange", lambda one, other: False)
    for content in ("first", "second"):
        with beside(tmp_path / "out") as folder:
            write(folder / "made", new_folder, content)
            put_in_place(folder / "made", tmp_path / "out")
        assert read(tmp_path / "out") == content and [one.name for one in tmp_path.iterdir()] == ["out"]


def test_where_the_second_rename_fails_the_earlier_result_is_back(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_exchange", lambda one, other: False)
    write(tmp_path / "out", new_folder, "earlier")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "nothing", tmp_path / "out")
    assert read(tmp_path / "out") == "earlier" and [one.name for one in tmp_path.iterdir()] == ["out"]


def test_what_came_while_the_result_was_made_is_not_lost(tmp_path):
    with pytest.raises(FileExistsError, match="holds files of others"), new_folder(tmp_path / "out", "merged"):
        write(tmp_path / "out", new_folder)
        (tmp_path / "out/thesis.txt").touch()
    assert (tmp_path / "out/thesis.txt").exists()


def test_a_socket_that_listens_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("out")
        with pytest.raises(FileExistsError, match="is a socket"):
            write_json(Path("out"), {})
