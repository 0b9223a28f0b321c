"""common.py: errors as sentences, whole files, flags and processes."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

import common
from common import UserError


@pytest.mark.parametrize("error, said", [
    (UserError("this flag does not go with that one."), "this flag does not go with that one."),
    (OSError(28, "No space left on device", "pairs/x"), "cannot read or write: .*No space left on device: 'pairs/x'.*same command"),
    (SafetensorError("bad header"), "cannot read or write: bad header"),
    (torch.OutOfMemoryError("2 GiB"), "out of memory: give a smaller --batch-size.*--micro-batch.*2 GiB"),
    (KeyboardInterrupt(), "stopped. The same command goes on")])
def test_a_program_ends_in_a_sentence_where_the_user_can_put_it_right(error, said):
    @common.program
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit, match=said):
        main()


@pytest.mark.parametrize("bug", [ValueError, KeyError, TypeError, RuntimeError, ZeroDivisionError])
def test_a_bug_keeps_its_traceback(bug):
    @common.program
    def main(argv=None):
        raise bug("a bug")

    with pytest.raises(bug):
        main()


def test_a_program_gives_its_flags_on_and_returns_what_main_returns():
    @common.program
    def main(argv=None):
        return argv

    assert main(["a"]) == ["a"] and main() is None and main.__name__ == "main"


def test_a_file_appears_whole_or_not_at_all_and_with_its_folder(tmp_path):
    path = tmp_path / "new" / "file"
    common.write_file(str(path), "ä")
    assert path.read_bytes() == "ä".encode() and os.listdir(path.parent) == ["file"]
    with pytest.raises(TypeError):
        common.write_file(str(path), 5)
    assert path.read_bytes() == "ä".encode()


def test_bad_json_is_named_by_file_and_line(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="a.json is not valid JSON"):
        common.read_json(str(tmp_path / "a.json"))
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n[2]\n')
    with pytest.raises(UserError, match=r"a.jsonl:3: not a JSON object: \[2\]"):
        common.read_lines(str(tmp_path / "a.jsonl"))
    rows = [dict(a="ö"), dict(b=None)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + common.to_lines(rows), encoding="utf-8")  # as Windows' editors write it
    assert common.read_lines(str(tmp_path / "a.jsonl")) == rows


def test_a_folder_goes_on_with_the_same_settings_only(tmp_path):
    path = str(tmp_path / "settings.json")
    common.same_settings(path, dict(a=1, b="x"))
    before = os.stat(path).st_mtime_ns
    common.same_settings(path, dict(a=1))
    assert json.load(open(path)) == dict(a=1, b="x") and os.stat(path).st_mtime_ns == before
    with pytest.raises(UserError, match="was begun with b x, not y: use the same again"):
        common.same_settings(path, dict(a=1, b="y"))


@pytest.mark.parametrize("kind, good, bad", [
    (common.at_least(1), ["1", "30"], ["0", "-1", "1.5", "x"]), (common.at_least(0, float), ["0", "7.5"], ["-0.1", "inf", "nan"]),
    (common.positive, ["1e-9", "3"], ["0", "-1", "nan", "inf"])])
def test_numbers_out_of_range_are_no_flags(kind, good, bad):
    for text in good:
        assert kind(text) == float(text)
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


def test_alone_there_is_one_process_and_it_holds_the_folder(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with common.processes(str(tmp_path / "new")) as (rank, world, device):
        assert (rank, world) == (0, 1) and device.type in ("cpu", "cuda")
        with pytest.raises(UserError, match="another process is writing into .*new"), common.holding(str(tmp_path / "new")):
            pass
    with common.holding(str(tmp_path / "new")):
        pass
    assert "RANK" not in os.environ


def test_a_folder_held_by_another_process_is_free_when_that_is_killed(tmp_path):
    holder = "import common, sys, time\nwith common.holding(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE,
                               cwd=os.path.dirname(os.path.abspath(common.__file__)))
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is writing into"), common.holding(str(tmp_path)):
            pass
    finally:
        process.kill()
        process.wait()
    with common.holding(str(tmp_path)):
        pass
