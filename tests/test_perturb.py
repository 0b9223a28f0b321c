"""perturb.py: 40 to 70 % of the words go, the same everywhere, and bad input is named."""

import json
import os
import subprocess
import sys

import pytest

import perturb
from perturb import remove_words


def words(n):
    return " ".join(f"w{i}" for i in range(n))


def is_subsequence(short, long):
    rest = iter(long)
    return all(word in rest for word in short)


@pytest.mark.parametrize("n", range(2, 41))
def test_the_share_removed_is_between_40_and_70_percent(n):
    counts = set()
    for seed in range(60):
        left = remove_words(words(n), seed).split()
        counts.add(n - len(left))
        assert is_subsequence(left, words(n).split())
    allowed = {k for k in range(1, n) if 4 * n <= 10 * k <= 7 * n}  # in whole numbers, not floats
    assert counts == allowed or (counts < allowed and n > 20)


def test_where_no_whole_number_lies_in_the_range_the_nearest_is_taken():
    assert {len(remove_words(words(4), s, low=0.55, high=0.6).split()) for s in range(20)} == {2}
    assert {len(remove_words(words(2), s, low=0.8, high=0.9).split()) for s in range(20)} == {1}  # one word stays
    assert {len(remove_words(words(3), s, low=0.05, high=0.1).split()) for s in range(20)} == {2}  # and one goes


def test_every_word_is_removed_equally_often():
    left = [word for s in range(4000) for word in remove_words(words(5), s).split()]
    for word in words(5).split():  # 2 or 3 of 5 go, so half stays: 2000 of 4000, standard deviation 32
        assert abs(left.count(word) - 2000) < 160


def test_it_depends_on_seed_variant_and_prompt():
    c = words(30)
    assert remove_words(c, 0, 0) == remove_words(c, 0, 0)
    assert len({remove_words(c, s, v) for s in range(3) for v in range(3)}) == 9
    assert remove_words("other " + c, 0) != remove_words(c, 0)


@pytest.mark.parametrize("c", ["", "word", "   word  "])
def test_prompts_of_fewer_than_two_words_are_refused(c):
    with pytest.raises(ValueError, match="two words"):
        remove_words(c)


@pytest.mark.parametrize("low, high", [(0, 0.5), (0.5, 0.4), (0.5, 1), (float("nan"), 0.5)])
def test_bounds_must_make_sense(low, high):
    with pytest.raises(ValueError, match="low"):
        remove_words(words(5), low=low, high=high)


def run(*arguments, **environment):
    command = [sys.executable, os.path.abspath(perturb.__file__), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_the_file_is_the_same_in_two_processes(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i} " + words(12) for i in range(50)))
    for out, hash_seed in (("a.jsonl", "1"), ("b.jsonl", "2")):
        assert run(tmp_path / "p.txt", tmp_path / out, "--variants", 3, PYTHONHASHSEED=hash_seed).returncode == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in open(tmp_path / "a.jsonl")]
    assert len(rows) == 150 and len({row["id"] for row in rows}) == 150
    assert all(row["c"] != row["c_minus"] and is_subsequence(row["c_minus"].split(), row["c"].split()) for row in rows)
    assert len({row["c_minus"] for row in rows}) > 140


def test_short_prompts_are_left_out_and_named_and_repeated_variants_dropped(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("two words\n\nhorse\none more here\n")
    perturb.main([str(tmp_path / "p.txt"), str(tmp_path / "out.jsonl"), "--variants", "9"])
    rows = [json.loads(line) for line in open(tmp_path / "out.jsonl")]
    assert {row["c_minus"] for row in rows if row["c"] == "two words"} == {"two", "words"}
    assert len(rows) == 5 and len({row["id"] for row in rows}) == 5
    assert "left out 2 prompts of fewer than two words, in lines 2, 3" in capsys.readouterr().out


def test_jsonl_keeps_ids_and_non_latin_text(tmp_path):
    text = '{"id": 7, "prompt": "ein großer roter Bär"}\n\n{"prompt": "красный круг слева"}\n'
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    perturb.main([str(tmp_path / "p.jsonl"), str(tmp_path / "new" / "out.jsonl")])
    rows = [json.loads(line) for line in open(tmp_path / "new" / "out.jsonl", encoding="utf-8")]
    assert [row["id"] for row in rows] == ["7", "000003"]
    assert "großer" in open(tmp_path / "new" / "out.jsonl", encoding="utf-8").read()


def test_all_bad_lines_are_named_and_nothing_is_written(tmp_path):
    bad = b'{"prompt": "fine and good"}\n{"prompt": 3}\n[1]\nnot json\n{"text": "no"}\n\xff\xfe\n'
    bad += b'{"prompt": "half a character \\ud800"}\n'
    (tmp_path / "p.jsonl").write_bytes(bad + b'{"id": "x", "prompt": "a b"}\n{"id": "x", "prompt": "c d"}\n')
    (tmp_path / "out.jsonl").write_text("what was there")
    with pytest.raises(SystemExit) as stop:
        perturb.main([str(tmp_path / "p.jsonl"), str(tmp_path / "out.jsonl")])
    for number in (2, 3, 4, 5, 6, 7, 9):
        assert f"p.jsonl:{number}: " in str(stop.value)
    assert "p.jsonl:1: " not in str(stop.value) and "p.jsonl:8: " not in str(stop.value)
    assert "7 bad lines" in str(stop.value)
    assert (tmp_path / "out.jsonl").read_text() == "what was there"


@pytest.mark.parametrize("arguments, message", [
    (["none.txt", "out.jsonl"], "no file none.txt"),
    (["p.txt", "p.txt"], "the file of prompts itself"),
    (["p.txt", "out.jsonl", "--variants", "0"], "--variants must be 1 or more, not 0"),
    (["p.txt", "out.jsonl", "--low", "0.8"], "--low and --high"),
    (["p.txt", "."], ". is a folder"), (["p.txt", "p.txt/out.jsonl"], "cannot write p.txt/out.jsonl: "),
    (["short.txt", "out.jsonl"], "no prompt of two words or more"),
])
def test_mistakes_end_in_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a prompt of words\n")
    (tmp_path / "short.txt").write_text("word\n")
    with pytest.raises(SystemExit, match=message):
        perturb.main(arguments)
    assert not os.path.exists("out.jsonl")
