"""lib/files.py and lib/processes.py: errors as sentences, whole files, flags and processes."""

import argparse
import io
import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from lib.files import UserError, json_lines, read_json, reading, same_settings, to_lines, write_file
from lib.processes import at_least, holding, processes, program


@pytest.mark.parametrize("error, said", [
    (UserError("this flag does not go with that one."), "this flag does not go with that one."),
    (OSError(28, "No space left on device", "pairs/x"), "cannot read or write: .*No space left on device: 'pairs/x'.*same command"),
    *[(kind(17, "so it is", "a/b"), "^a/b is a file where a folder is needed, or a folder where a file is: move it away.$")
      for kind in (FileExistsError, NotADirectoryError, IsADirectoryError)],
    (SafetensorError("bad header"), "cannot read or write: bad header"),
    (torch.OutOfMemoryError("2 GiB"), "out of memory: give a smaller --batch-size.*--lora-rank. 2 GiB"),
    (KeyboardInterrupt(), "^stopped. The same command goes on from what was written, or begins anew where nothing was.$")])
def test_a_program_ends_in_a_sentence_where_the_user_can_put_it_right(error, said):
    @program
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit, match=said):
        main()


@pytest.mark.parametrize("bug", [ValueError, KeyError, TypeError, RuntimeError, ZeroDivisionError])
def test_a_bug_keeps_its_traceback(bug):
    @program
    def main(argv=None):
        raise bug("a bug")

    with pytest.raises(bug):
        main()


def test_a_program_gives_its_flags_on_and_returns_what_main_returns():
    @program
    def main(argv=None):
        return argv

    assert main(["a"]) == ["a"] and main() is None and main.__name__ == "main"


def test_an_empty_argument_is_no_name(monkeypatch):
    started = []
    main = program(lambda argv=None: started.append(argv))
    for argv in (["--out", ""], [""], ["a", "", "b"]):
        with pytest.raises(SystemExit, match="^an argument is '': give a name in its place, or leave it out with its flag.$"):
            main(argv)
        monkeypatch.setattr(sys, "argv", ["program.py", *argv])  # as of a shell
        with pytest.raises(SystemExit, match="^an argument is ''"):
            main()
    assert not started
    monkeypatch.setattr(sys, "argv", ["", "a"])  # of python -c
    main()
    assert started == [None]


def test_characters_that_the_terminal_does_not_have_do_not_end_a_program(monkeypatch):
    shown = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="cp1252", newline="\n"))
        program(lambda argv=None: print("c⁻ of Bär 舟"))()
        assert shown.getvalue() == b"c? of B\xe4r ?\n"


@pytest.mark.parametrize("size", [1, 10**6])  # what is printed at the end only, or at once
def test_a_closed_pipe_ends_a_program_in_a_sentence(size, monkeypatch):
    out, into = os.pipe()
    os.close(out)  # nobody reads
    with os.fdopen(into, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit, match="^stopped. The same command goes on from what was written"):
            program(lambda argv=None: print("x" * size))()
        sys.stdout.flush()  # as Python does at its end


def test_an_error_stands_on_a_line_of_its_own_after_a_progress_bar(capsys):
    @program
    def main(argv=None):
        bar = tqdm(total=2)
        bar.update()
        raise UserError("a sentence.")

    with pytest.raises(SystemExit) as caught:
        main()
    assert capsys.readouterr().err.endswith("\n") and str(caught.value) == "a sentence."


def test_a_file_appears_whole_or_not_at_all_and_with_its_folder(tmp_path):
    path = tmp_path / "new" / "file"
    write_file(str(path), "ä")
    assert path.read_bytes() == "ä".encode() and os.listdir(path.parent) == ["file"]
    with pytest.raises(TypeError):
        write_file(str(path), 5)
    assert path.read_bytes() == "ä".encode()
    write_file(str(path), lambda partial: Path(partial).write_bytes(b"b"))  # a name, not an open file: torch would
    assert path.read_bytes() == b"b" and os.listdir(path.parent) == ["file"]  # write through Python, and lose a Ctrl-C in it


def test_a_full_disk_leaves_the_state_that_was_there_and_no_half_of_another(tmp_path, monkeypatch):
    path = str(tmp_path / "state.pt")
    write_file(path, lambda partial: torch.save(dict(update=1), partial))
    real = torch.save

    def save(state, partial):
        real(state, partial)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 598")  # as torch 2.13 says it

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(OSError, match="the disk may be full: '.*state.pt'"):
            write_file(path, lambda partial: torch.save(dict(update=2), partial))
    assert torch.load(path) == dict(update=1) and os.listdir(tmp_path) == ["state.pt"]


def test_bad_json_is_named_by_file_and_line(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a.json cannot be read \(Expecting .*\): it must be whole and valid JSON"):
        read_json(str(tmp_path / "a.json"))
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{2\n')
    assert list(json_lines(str(tmp_path / "a.jsonl"))) == [(1, dict(a=1)), (3, "{2")]
    rows = [dict(a="ö"), dict(b=None)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + to_lines(rows), encoding="utf-8")  # as Windows' editors write it
    assert [row for _, row in json_lines(str(tmp_path / "a.jsonl"))] == rows


def test_a_file_that_holds_more_than_weights_is_damaged_and_is_not_to_be_run(tmp_path):
    path = tmp_path / "net.pt"
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2)), lambda _, path: path.write_text("<html>"), lambda _, path: path.write_text("junk")):
        write(argparse.Namespace(a=1), path)
        with pytest.raises(UserError) as stop, reading(path, "delete it."):
            torch.load(path, weights_only=True)
        assert str(stop.value) == f"{path} cannot be read (it is damaged, or holds more than weights): delete it."


def test_a_folder_goes_on_with_the_same_settings_only(tmp_path):
    path = str(tmp_path / "settings.json")
    same_settings(path, dict(a=1, b="x"))
    before = os.stat(path).st_mtime_ns
    same_settings(path, dict(a=1))
    assert json.load(open(path)) == dict(a=1, b="x") and os.stat(path).st_mtime_ns == before
    with pytest.raises(UserError, match="was begun with b x, not y: use the same again"):
        same_settings(path, dict(a=1, b="y"))
    with pytest.raises(UserError, match="was begun with other weights than now: use the same again"):
        same_settings(path, dict(weights="0123456789abcdef"))
    write_file(path, json.dumps(dict(weights="fedcba9876543210")))
    with pytest.raises(UserError, match=f"^{tmp_path} was begun with other weights than now: use the same again, or another folder.$"):
        same_settings(path, dict(weights="0123456789abcdef"))
    with pytest.raises(UserError, match=f"^{tmp_path} holds other files and no new.json: move it away"):
        same_settings(str(tmp_path / "new.json"), dict(a=1))
    os.remove(path)
    (tmp_path / ".lock").touch()
    (tmp_path / "new.json.partial").touch()
    same_settings(path, dict(a=1), dict(note=2))
    same_settings(path, dict(a=1), dict(note=3))
    assert json.load(open(path)) == dict(note=2, a=1)


@pytest.mark.parametrize("kind, good, bad", [
    (at_least(1), ["1", "30"], ["0", "-1", "1.5", "x"]), (at_least(0, float, 8), ["0", "7.5", "8"], ["-0.1", "inf", "nan", "8.1", "1e9"]),
    (at_least(1e-6, float, 1e6), ["1e-6", "3"], ["0", "-1", "nan", "inf", "1e-7"])])
def test_numbers_out_of_range_are_no_flags(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


def test_alone_there_is_one_process_and_it_holds_the_folder(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with processes(str(tmp_path / "new")) as (rank, world, device):
        assert (rank, world) == (0, 1) and device.type in ("cpu", "cuda")
        with pytest.raises(UserError, match="another process is writing into .*new"), holding(str(tmp_path / "new")):
            pass
    with holding(str(tmp_path / "new")):
        pass
    assert "RANK" not in os.environ


def test_a_folder_held_by_another_process_is_free_when_that_is_killed(tmp_path):
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        with holding(str(tmp_path)):
            os.write(into, b"held")
            time.sleep(60)
        os._exit(0)
    assert os.read(out, 4) == b"held"
    try:
        with pytest.raises(UserError, match="another process is writing into"), holding(str(tmp_path)):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with holding(str(tmp_path)):
        pass
