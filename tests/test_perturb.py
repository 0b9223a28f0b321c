"""perturb.py: 40 to 70 % of the words go, or a chat model rewrites them; the same everywhere, and bad input is named."""

import csv
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
import traceback

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
import transformers
from tqdm import tqdm

import perturb
from lib import prompts as lib_prompts
from lib.chat import VAGUE, load_llm, read_answer, words_of
from lib.files import UserError
from lib.processes import holding
from lib.prompts import read_prompts, sample_prompts, split_tokens
from perturb import remove_words


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


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


def test_it_depends_on_seed_and_prompt():
    c = words(30)
    assert remove_words(c, 0) == remove_words(c, 0)
    assert len({remove_words(c, s) for s in range(9)}) == 9
    assert remove_words("other " + c, 0) != remove_words(c, 0)


@pytest.mark.parametrize("c", ["", "word", "   word  "])
def test_prompts_of_fewer_than_two_words_are_refused(c):
    with pytest.raises(ValueError, match="two words"):
        remove_words(c)


@pytest.mark.parametrize("low, high", [(0, 0.5), (0.5, 0.4), (0.5, 1), (float("nan"), 0.5)])
def test_bounds_must_make_sense(low, high):
    with pytest.raises(ValueError, match="low"):
        remove_words(words(5), low=low, high=high)


@pytest.mark.parametrize("c, tokens", [
    ("a red fox, in the  snow", ["a", "red", "fox,", "in", "the", "snow"]), ('"Hello," she said (a) 16:9', ['"Hello,"', "she", "said", "(a)", "16:9"]),
    ("a woman , 1,000 men, 8k", ["a", "woman", ",", "1,000", "men,", "8k"]), ("1girl,solo,smile", ["1girl,", "solo,", "smile"]),
    ("best quality,50mm,8k", ["best", "quality,", "50mm,", "8k"]), (", , , ,", []), ("fox, , ,tree,,", ["fox,", "tree,"]),
    ("(red car:1.3), [blue bike:0.8], sun", ["(red car:1.3),", "[blue bike:0.8],", "sun"]), ("((a b:1.2)),c", ["((a b:1.2)),", "c"]),
    ("一只红猫，坐着", ["一", "只", "红", "猫，", "坐", "着"]), ("แมวสีแดง", ["แ", "ม", "ว", "สี", "แ", "ด", "ง"]), ("赤いネコ", ["赤", "い", "ネ", "コ"]),
    ("1girl,女孩", ["1girl,", "女", "孩"]), ("赤い猫 4k", ["赤い猫", "4k"]), ("ёж", ["ёж"])])
def test_a_token_is_a_word_a_tag_a_weighted_bracket_or_a_letter(c, tokens):
    assert split_tokens(c)[0] == tokens
    if len(tokens) > 1:
        some = {remove_words(c, seed) for seed in range(20)}
        assert len(some) > 1 and all(0 < len(left) < len(c) and left in {split_tokens(c)[1]([t for t, keep in zip(tokens, mask) if keep])
                                     for mask in itertools.product([0, 1], repeat=len(tokens))} for left in some)


def test_what_is_left_of_tags_is_tidy_and_what_is_left_of_chinese_has_no_spaces():
    assert {remove_words("1girl,solo,smile", s) for s in range(40)} == {"1girl", "solo", "smile"}  # two of three go, or none but one stays
    assert {remove_words("fox,tree ,", s) for s in range(40)} == {"fox", "tree"}
    assert {remove_words("，「猫咪」", s) for s in range(40)} == {"，「猫", "咪」"}
    assert all(not set(remove_words("一只红猫，坐着", s)) & set(" ，") or "猫，" in remove_words("一只红猫，坐着", s) for s in range(20))


def test_plain_english_loses_the_words_that_it_always_lost():
    """Written by the version before tokens could be anything but words (seed 5)."""
    assert [remove_words(c, 5) for c in (
        "a portrait of a woman , intricate, elegant, highly detailed, 8 k, art by greg rutkowski", 'a sign that says "open," at 16:9 (wide), 1,000 lights',
        "two cats, one dog", "a red circle to the left of a blue square")] == [
        "a portrait woman , intricate, 8 k, by", "a sign at (wide),", "one dog", "circle to the of a square"]


def run(*arguments, **environment):
    command = [sys.executable, os.path.abspath(perturb.__file__), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_the_file_is_the_same_in_two_processes(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i} " + words(12) for i in range(50)))
    assert run(tmp_path / "p.txt", tmp_path / "a.jsonl", PYTHONHASHSEED="1").returncode == 0
    perturb.main([str(tmp_path / "p.txt"), str(tmp_path / "b.jsonl")])  # the hash seed here is random
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = rows_of(tmp_path / "a.jsonl")
    assert len(rows) == 50 and len({row["id"] for row in rows}) == 50
    assert all(row["c"] != row["c_minus"] and is_subsequence(row["c_minus"].split(), row["c"].split()) for row in rows)
    assert len({row["c_minus"] for row in rows}) > 45


def test_short_prompts_are_left_out_and_named(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("two words\n\nhorse\none more here\n")
    perturb.main([str(tmp_path / "p.txt"), str(tmp_path / "out.jsonl")])
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl")] == ["000001", "000004"]
    assert "left out 2 prompts of fewer than two words, in lines 2, 3" in capsys.readouterr().out


def test_jsonl_keeps_ids_and_non_latin_text(tmp_path):
    text = '{"id": 7, "prompt": "ein großer roter Bär"}\n\n{"prompt": "красный круг слева"}\n'
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    perturb.main([str(tmp_path / "p.jsonl"), str(tmp_path / "new" / "out.jsonl")])
    rows = rows_of(tmp_path / "new" / "out.jsonl")
    assert [row["id"] for row in rows] == ["7", "000003"]
    assert "großer" in open(tmp_path / "new" / "out.jsonl", encoding="utf-8").read()


def test_all_bad_lines_are_named_and_nothing_is_written(tmp_path):
    bad = b'{"prompt": "fine and good"}\n{"prompt": 3}\n[1]\nnot json\n{"text": "no"}\n\xff\xfe\n'
    bad += b'{"prompt": "half a character \\ud800"}\n'
    (tmp_path / "p.jsonl").write_bytes(bad + b'{"id": "x", "prompt": "a b"}\n{"id": "x", "prompt": "c d"}\n')
    before = json.dumps(dict(id="1", c="a b", c_minus="a", strategy="random-removal", perturb_seed=0))
    (tmp_path / "out.jsonl").write_text(before)  # of an earlier run
    with pytest.raises(SystemExit) as stop:
        perturb.main([str(tmp_path / "p.jsonl"), str(tmp_path / "out.jsonl")])
    for number in (2, 3, 4, 5, 6, 7, 9):
        assert f"p.jsonl:{number}: " in str(stop.value)
    assert "p.jsonl:1: " not in str(stop.value) and "p.jsonl:8: " not in str(stop.value)
    assert "7 bad lines" in str(stop.value)
    assert (tmp_path / "out.jsonl").read_text() == before


@pytest.mark.parametrize("arguments, message", [
    (["none.txt", "out.jsonl"], "no file none.txt"), ([".", "out.jsonl"], "^. is a folder or a pipe, and no file.$"), (["pipe", "out.jsonl"], "^pipe is a folder or a pipe"),
    (["p.txt", "p.txt"], "^p.txt is there already, and perturb.py did not write it: give another name.$"),
    *[([name, "out.jsonl"], f"{name}: the prompts must be a .txt, .jsonl, .csv or .parquet file.") for name in ("p.json", "p.tsv")],
    *[([name, "out.jsonl"], rf"^{name} cannot be read \(its columns are a prompt of words\): write it as a .csv file with one column prompt") for name in ("p.csv", "p.CSV")],
    (["p.JSONL", "out.jsonl"], "p.JSONL:1: not a row with texts prompt: a prompt of words"), (["p.txt", "out.txt"], "out.txt: the name must end in .jsonl"),
    (["p.txt", "out.jsonl", "--low", "0.8"], "--low and --high"), (["p.txt", "out.jsonl", "--high", "1"], "--low and --high"),
    *[(["p.txt", out], f"{out} is there already, and perturb.py did not write it") for out in (".", "/dev/null", "dangling", "mine.jsonl", "pairs.jsonl")],
    (["p.txt", "new.jsonl", "--strategy", "llama-aesthetic"], "new.jsonl.rejected.jsonl is there already, and perturb.py did not"),
    (["p.txt", "p.txt/out.jsonl"], "p.txt\\S* is a file where a folder is needed"),
    (["short.txt", "out.jsonl"], "no prompt of two words or more"),
])
def test_mistakes_end_in_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("p.txt", "p.csv", "p.JSONL", "p.json", "p.tsv", "p.CSV"):
        (tmp_path / name).write_text("a prompt of words\n" + "more words\n" * name.lower().endswith("csv"))
    (tmp_path / "short.txt").write_text("word\n")
    row = dict(id="1", c="a b", c_minus="a", strategy="random-removal", perturb_seed=0)  # as ours; that of a store has more
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row | dict(noise_seed=0, shard=0, row=0)))
    for name in ("mine.jsonl", "new.jsonl.rejected.jsonl"):
        (tmp_path / name).write_text(json.dumps(row) + '\n{"id": "2", "c": "a b", "c_minus": "a"}\n')
    os.symlink("nowhere", "dangling")
    os.mkfifo("pipe")
    before = {name: os.path.isfile(name) and open(name, "rb").read() for name in os.listdir()}
    with pytest.raises(SystemExit, match=message):
        perturb.main(arguments)
    assert {name: os.path.isfile(name) and open(name, "rb").read() for name in os.listdir()} == before


def test_a_link_as_out_stays_a_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a prompt of words\n")
    perturb.main(["p.txt", "real.jsonl"])
    before = (tmp_path / "real.jsonl").read_bytes()
    os.symlink("real.jsonl", "out.jsonl")
    perturb.main(["p.txt", "out.jsonl", "--seed", "1"])
    assert os.path.islink("out.jsonl") and (tmp_path / "real.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes() != before


def test_it_works_where_nothing_can_be_said(tmp_path):
    (tmp_path / "p.txt").write_text("a prompt of words\n")
    done = subprocess.run(f"{sys.executable} {os.path.abspath(perturb.__file__)} p.txt out.jsonl >&- 2>err", shell=True, cwd=tmp_path)
    assert done.returncode == 0 and len(rows_of(tmp_path / "out.jsonl")) == 1 and "Traceback" not in (tmp_path / "err").read_text()


# ---- sources and samples


def write_table(path, prompts, **more):
    pyarrow.parquet.write_table(pyarrow.table(more | dict(prompt=prompts)), path, row_group_size=2)


PROMPTS = ["a red fox", "ein großer, roter Bär", 'a sign: "no"', "", "horse", "a red fox", "two old boats"]
KEPT = [1, 2, 3, 7]  # the others have fewer than two words, or are duplicates


def test_one_reader_takes_text_rows_of_prompts_and_rows_of_pairs(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa red fox \n\na “blue” cup".encode())
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "c": "y"}\n\n{"id": 1, "c": "z", "c_minus": "w"}\n')
    write_table(tmp_path / "p.parquet", ["a", "b"], id=["k", "l"])
    for name, expected in (("p.txt", [(1, "000001", "a red fox"), (2, "000002", ""), (3, "000003", "a “blue” cup")]),
                           ("p.jsonl", [(1, "000001", "x"), (3, "1", "z")]), ("p.parquet", [(1, "k", "a"), (2, "l", "b")])):
        assert list(read_prompts(str(tmp_path / name))) == expected


def test_every_kind_of_source_gives_the_same_prompts_and_counts_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    open("p.txt", "w", encoding="utf-8").write("\n".join(PROMPTS))
    open("P.TXT", "w", encoding="utf-8").write("\n".join(PROMPTS))
    with open("p.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["seed", "prompt", "id"], *[[i, c, f"n{i}"] for i, c in enumerate(PROMPTS, 1)]])
    open("p.jsonl", "w").write("\n".join(json.dumps(dict(prompt=c, id=f"n{i}")) for i, c in enumerate(PROMPTS, 1)))
    write_table("p.parquet", pyarrow.array([c or None for c in PROMPTS], pyarrow.large_string()), seed=range(7))
    write_table("metadata.parquet", PROMPTS)
    asked = []

    def hf_hub_download(repo, file, **how):
        asked.append((repo, file, how))
        return "metadata.parquet"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    for source, ids in (("p.txt", "{:06d}"), ("P.TXT", "{:06d}"), ("p.csv", "n{}"), ("p.jsonl", "n{}"), ("p.parquet", "{:06d}"), ("diffusiondb", "{:06d}")):
        perturb.main([source, "out.jsonl"])
        rows, said = rows_of("out.jsonl"), capsys.readouterr().out
        assert [row["c"] for row in rows] == [PROMPTS[i - 1] for i in KEPT]
        assert [row["id"] for row in rows] == [ids.format(i) for i in KEPT]
        assert all(row["strategy"] == "random-removal" and row["perturb_seed"] == 0 for row in rows)
        assert f"left out 2 prompts of fewer than two words, in lines {'5, 6' if source == 'p.csv' else '4, 5'}\n" in said
        assert f"left out 1 duplicate prompt, in lines {'7' if source == 'p.csv' else '6'}\n" in said
    assert asked == [("poloclub/diffusiondb", "metadata.parquet", dict(repo_type="dataset"))]


def test_an_empty_id_is_none_and_a_csv_says_its_lines(tmp_path, capsys):
    (tmp_path / "p.csv").write_text('prompt,id\na red fox,x\n\n"two old\nboats",\na cup,\nhorse,\n')
    write_table(tmp_path / "p.parquet", ["a fox", "a cup"], id=pyarrow.array([None, ""], pyarrow.string()))
    perturb.main([str(tmp_path / "p.csv"), str(tmp_path / "out.jsonl")])
    assert [(row["id"], row["c"]) for row in rows_of(tmp_path / "out.jsonl")] == [("x", "a red fox"), ("000005", "two old\nboats"), ("000006", "a cup")]
    assert "left out 1 prompt of fewer than two words, in lines 7\n" in capsys.readouterr().out
    assert [name for _, name, _ in read_prompts(str(tmp_path / "p.parquet"))] == ["000001", "000002"]


def write(path, content):
    open(path, "wb").write(content)


@pytest.mark.parametrize("name, make, message", [
    ("p.jsonl", lambda p: write(p, b"[" * 100_000 + b'\n{"prompt": ' + b"1" * 5000 + b"}\n"), r"^p.jsonl:1: not a row with texts prompt(.|\n)*\np.jsonl:2: not a row with texts prompt"),
    ("p.parquet", lambda p: write_table(p, [1, 2]), "^p.parquet:1: not a row with texts prompt: {'prompt': 1}\n.*:2: "),
    ("p.parquet", lambda p: write_table(p, ["a b", "c d"], id=["x", "x"]), "^p.parquet:2: the id x is already that of line 1"),
    ("p.parquet", lambda p: pyarrow.parquet.write_table(pyarrow.table(dict(n=[1], text=["a"])), p), r"^p.parquet cannot be read \('Column prompt does not exist in schema'\): it must be a whole .parquet file with columns prompt, each once"),
    ("p.parquet", lambda p: pyarrow.parquet.write_table(pyarrow.table([["a b"], ["c d"]], ["prompt", "prompt"]), p), "^p.parquet cannot be read .*: it must be a whole .parquet file with columns prompt, each once"),
    ("p.jsonl", lambda p: write(p, b'{"prompt": "a b", "id": [1]}\n{"prompt": "a b", "id": "[1]"}'), r"^p.jsonl:1: not a row with texts prompt: .*'id': \[1\]"),
    ("p.jsonl", lambda p: write(p, b'{"prompt": "a b"}\n{"prompt": "c d", "id": {"x": 1}}'), r"^p.jsonl:2: not a row with texts prompt: .*'id': {'x': 1}}\n1 bad line"),
    *[("p.csv", lambda p, head=head: write(p, f"{head}\na fox,a cup\n".encode()), rf"^p.csv cannot be read \(its columns are {head.replace(',', ', ')}\): write it as a .csv file with one column prompt, and texts with commas in quotes.\Z")
      for head in ("prompt,prompt", "id,Prompt")],
    ("p.txt", lambda p: write(p, b"two cups\na red\0 fox\n"), "^p.txt:2: it holds a NUL, or is in another encoding than UTF-8: save the file as UTF-8\n1 bad line"),
    ("p.jsonl", lambda p: write(p, b'{"prompt": "a red\\u0000 fox"}'), "^p.jsonl:1: it holds a NUL"),
    ("p.csv", lambda p: write(p, "prompt\nein Bär\n".encode("latin-1")), "^p.csv:2: it holds a NUL, or is in another encoding than UTF-8"),
    ("p.csv", lambda p: write(p, b"id,prompt\n1,a fox, red\n2,a cup\n3\n"), r"^p.csv:2: not a row with texts prompt: .*\np.csv:4: not a row with texts prompt: .*\n2 bad lines"),
    ("p.csv", lambda p: write(p, b'prompt\n"a fox\na cup\n'), r"^p.csv cannot be read \(unexpected end of data\): write it as a .csv file with one column prompt"),
    *[(name, lambda p, text=text: write(p, text), rf"^{name}:1: it holds a NUL, or is in another encoding than UTF-8: save the file as UTF-8\n(.|\n)*2 bad lines in {name} to be") for name, text in (
        ("p.txt", "a red fox\ntwo cups".encode("utf-16")), ("p.txt", "a red fox\ntwo cups".encode("utf-16-le")),
        ("p.jsonl", '{"prompt": "a fox"}\n{"prompt": "a cup"}'.encode("utf-16")), ("p.txt", "ein Bär\nöl\n".encode("latin-1")))],
    ("p.parquet", lambda p: write(p, b"not a table"), r"^p.parquet cannot be read \(.*\): it must be a whole .parquet file"),
    ("p.parquet", lambda p: (write_table(p, words(5000).split()), os.truncate(p, 3000)), r"^p.parquet cannot be read \(.*\): it must be a whole .parquet file"),
])
def test_bad_tables_are_named_by_file_and_row(name, make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(name)
    with pytest.raises(SystemExit, match=message):
        perturb.main([name, "out.jsonl"])
    assert os.listdir() == [name]


def test_without_network_it_says_which_file_to_fetch_and_how_to_give_it(tmp_path):
    with pytest.raises(SystemExit) as stop:
        perturb.main(["diffusiondb", str(tmp_path / "out.jsonl")])
    assert "metadata.parquet of the dataset poloclub/diffusiondb cannot be read (" in stop.value.code and "\n" not in stop.value.code
    assert "https://huggingface.co/datasets/poloclub/diffusiondb/tree/main and give its path instead of diffusiondb." in stop.value.code


def test_a_sample_is_those_of_smallest_hash_whatever_else_stands_in_the_file_and_in_any_order(tmp_path):
    prompts = [f"prompt number {i}" for i in range(300)]

    def sample(prompts, *flags):
        rows = [json.dumps(dict(prompt=c, id=c.split()[-1])) for c in prompts]
        (tmp_path / "p.jsonl").write_text("\n".join(rows))
        perturb.main([str(tmp_path / "p.jsonl"), str(tmp_path / "out.jsonl"), *flags])
        return [row["id"] for row in rows_of(tmp_path / "out.jsonl")]

    by_hash = sorted(prompts, key=lambda c: hashlib.sha256(f"0 {c}".encode()).hexdigest())
    expected = [c.split()[-1] for c in prompts if c in by_hash[:20]]  # in the file's order
    assert sample(prompts, "--limit", "20") == expected
    assert expected[:5] == ["17", "38", "55", "93", "99"]
    assert sample(prompts, "--limit", "20", "--seed", "1") != expected
    random.Random(0).shuffle(prompts)
    assert sorted(sample(prompts, "--limit", "20"), key=int) == expected
    assert sorted(sample([c for c in prompts if c in by_hash[:40]], "--limit", "20"), key=int) == expected
    assert len(sample(prompts, "--limit", "301")) == len(sample(prompts)) == 300
    everything = {row["id"]: row for row in rows_of(tmp_path / "out.jsonl")}
    sample(prompts, "--limit", "20")
    assert all(everything[row["id"]] == row for row in rows_of(tmp_path / "out.jsonl"))


def test_spacing_makes_no_other_prompt_tags_of_nothing_are_none_and_weights_are_mentioned_once(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red  fox\na red fox\n, , , ,\n(red car:1.3), sun\n[sun:0.5],moon\n1girl,solo\n一只猫\n")
    perturb.main([str(tmp_path / "p.txt"), str(tmp_path / "out.jsonl")])
    said = capsys.readouterr().out
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl")] == ["000001", "000004", "000005", "000006", "000007"]
    assert "left out 1 duplicate prompt, in lines 2\n" in said and "left out 1 prompt of fewer than two words, in lines 3\n" in said
    assert said.count("2 of the prompts have weights like (red car:1.3): diffusers reads their signs as text\n") == 1


def test_the_numbers_of_duplicates_and_of_taken_prompts_are_reported(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("".join(f"prompt {i % 30}\n" for i in range(100)))
    perturb.main([str(tmp_path / "p.txt"), str(tmp_path / "out.jsonl"), "--limit", "7"])
    said = capsys.readouterr().out
    assert "left out 70 duplicate prompts, in lines 31, 32, " in said and ", 40, ...\n" in said
    assert "7 pairs of prompts" in said


def test_a_sample_does_not_hold_all_prompts_in_memory(monkeypatch):
    def prompts(source):
        for i in range(30_000):
            yield i, str(i), f"{i} " + "x" * 10_000  # 300 MB in all

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(lib_prompts, "read_prompts", prompts)
    assert len(sample_prompts("p.txt", 2, 100, 0)) == 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


# ---- rewriting by a chat model


def told_of(instruction):
    return f" {' '.join(words_of(instruction))} "


@pytest.mark.parametrize("answer, c_minus", [
    ('{"prompt": "a fox"}', "a fox"), (' \n{ "prompt" :\n" a fox "}\n', "a fox"),
    ('```json\n{"prompt": "a fox"}\n```', "a fox"), ('\n```json {"prompt": "ein Fox \\u00e4"}``` ', "ein Fox ä"),
    ('{"prompt": "fox {\\"prompt\\": 1}"}', 'fox {"prompt": 1}'), ('{"prompt": "a red fo"}', "a red fo"),
    ('Here it is: {"prompt": "a fox"}', "a fox"), ('{"prompt": "a fox"} Enjoy!', "a fox"), ('```json\n{"prompt": "fox"}', "fox"),
    ('{"prompt": "fox"}{"prompt": "red"}', "fox"), ('{"prompt": "fox", "why": "b"}', "fox"), ('{x} {"why": 1} {"prompt": "fox"}', "fox"),
    ('Important words: ["fox"]\nFinal output:\n{"neg_prompts": ["a fox"]}', "a fox"), ('{"positive_prompts": ["a Fox"], "neg_prompts": ["fox"]}', "fox"),
    ('[{"prompt": "a fox"}]', "a fox"), ('{"Prompt": "red"} {"prompt": 3} {"prompt": "fox"}', "fox"), ('{"neg_prompts": ["a red Fox", "Fox red"]}', "Fox red"),
    ("", "not JSON"), ("a fox", "not JSON"), ('{"prompt": "a fo', "not JSON"), ("{'prompt': 'a fox'}", "not JSON"), ("```json```", "not JSON"),
    ("[" * 100_000, "not JSON"), ("{" * 100_000, "not JSON"), ('{"prompt": ' * 2000, "not JSON"), ("1" * 5000, "not JSON"), ('{"prompt": "a\nb"}', "not JSON"),
    ('"a fox"', "not JSON"), ('["prompt"]', "not JSON"), ("{}", "not {"), ('{"prompt": 3}', "not {"), ('{"prompt": null}', "not {"),
    ('{"prompt": ["a"]}', "not {"), ('{"Prompt": "a"}', "not {"), ('{"neg_prompts": "a fox"}', "not {"), ('{"neg_prompts": ["a fox", 3]}', "not {"),
    ('{"prompt": ""}', "empty or"), ('{"prompt": " \\n "}', "empty or"), ('{"prompt": "..."}', "empty or"), ('{"prompt": "a red fox"}', "the same as c"),
    ('{"prompt": "A  Red\\tFOX "}', "the same as c"), ('{"prompt": "\\ud800 half"}', "half a character"), ('{"neg_prompts": []}', "too vague"),
    ('{"prompt": "the new prompt"}', "the instruction's own words"), ('{"prompt": "The New Prompt: fox"}', "the instruction's own words"),
    ('{"prompt": "A worse one."}', "the instruction's own words"), ('{"prompt": "the colours"}', "the instruction's own words"),
    ('{"prompt": "a red fox, a red dog, a car"}', "longer than twice c"), ('{"prompt": "an animal"}', "no content word of c"),
])
def test_an_answer_is_the_first_json_object_with_a_prompt_that_says_less_of_c(answer, c_minus):
    found = read_answer(answer, "a red Fox", told_of("Write a worse one. Leave out the colours of its fox."), alignment=True)
    assert found == dict(c_minus=c_minus) or found["answer"] == answer and c_minus in found["reason"] and "fox" not in c_minus


def test_words_that_the_instruction_shares_with_c_are_no_repetition_and_a_long_run_of_its_words_is():
    told, c = told_of(perturb.INSTRUCTIONS["llama-alignment"]), "the same scene, an image of a prompt on a screen with many colours and other things to see, of which there are two"
    assert read_answer('{"prompt": "the same scene"}', c, told, True) == dict(c_minus="the same scene")
    assert read_answer('{"prompt": "an image"}', c, told, True) == dict(c_minus="an image")
    for said in ("screen: Write a worse one, whose image would not show what this", "a screen of two colours, whose image would not show what this one"):
        assert read_answer(json.dumps(dict(prompt=said)), c, told, True)["reason"] == "the instruction's own words"
        assert read_answer(json.dumps(dict(prompt=said.replace("would", "will"))), c, told, True) == dict(c_minus=said.replace("would", "will"))
    assert read_answer('{"prompt": "for a text-to-image model"}', c, told, False)["reason"] == "the instruction's own words"


@pytest.mark.parametrize("said, c, good", [
    ("the fruit on a", "two apples on the table", False), ("an apple", "two apples on the table", True), ("An APPLE!", "two apples, on a table", True),
    ("桌子", "桌子上的苹果", True), ("猫", "桌子上的苹果", False), ("a pine", "two pineapples", False), ("a thing", "the", True)])
def test_an_answer_in_other_words_is_refused_for_the_alignment_only(said, c, good):
    c += " " * 20  # so that no answer is too long
    assert read_answer(json.dumps(dict(prompt=said)), c) == dict(c_minus=said)
    found = read_answer(json.dumps(dict(prompt=said)), c, alignment=True)
    assert found == dict(c_minus=said) if good else found["reason"] == "no content word of c"


def test_of_several_negative_prompts_one_usable_is_drawn_by_seed_and_prompt():
    answer = json.dumps(dict(neg_prompts=["a red fox", "a fox", "red", "fox"]))
    drawn = {seed: read_answer(answer, "a red fox", seed=seed)["c_minus"] for seed in range(40)}
    assert set(drawn.values()) == {"a fox", "red", "fox"} and read_answer(answer, "a red fox", seed=3) == dict(c_minus=drawn[3])
    assert len({read_answer(json.dumps(dict(neg_prompts=list("xyz"))), f"x y z {i}")["c_minus"] for i in range(40)}) == 3


def rewritten(rows, ask, attempts, seed, batch_size=64):
    with tqdm(disable=True) as bar:
        return perturb.rewrite(rows, ask, read_answer, attempts, seed, batch_size, bar)


def test_what_cannot_be_used_is_asked_again_with_another_seed_and_in_the_end_rejected():
    asked = []
    answers = iter([["no", '{"prompt": "TWO"}', "no", '{"prompt": "x"}'], ["no", '{"prompt": "y"}', "still not"], ["no", "last"]])

    def ask(prompts, seed):
        asked.append((prompts, seed))
        return next(answers)

    rows = [("a", "one"), ("b", "one again"), ("c", "two"), ("d", "three")]
    assert rewritten(rows, ask, 3, "7 0") == [
        dict(id="a", c="one", answer="no", reason="not JSON"), dict(id="b", c="one again", c_minus="x"),
        dict(id="c", c="two", c_minus="y"), dict(id="d", c="three", answer="last", reason="not JSON")]
    assert [prompts for prompts, _ in asked] == [["one", "two", "three", "one again"], ["one", "two", "three"], ["one", "three"]]
    seeds = [seed for _, seed in asked]
    for other in ("7 1", "8 0", "7 0"):
        asked.clear()
        answers = iter([["no"]] * 3)
        rewritten(rows[:1], ask, 3, other)
        assert len(set(seeds + [seed for _, seed in asked])) == (3 if other == "7 0" else 6)
    asked.clear()
    answers = iter([['{"prompt": "x"}']])
    rewritten(rows[:1], ask, 3, "")
    assert len(asked) == 1  # nothing is left to ask
    asked.clear()
    answers = iter([['{"neg_prompts": []}']])
    assert rewritten(rows[:1], ask, 3, "")[0]["reason"] == VAGUE
    assert len(asked) == 1  # what the model finds too vague is not asked again


def test_prompts_are_asked_in_batches_of_like_length_counted_one_by_one_and_the_first_result_is_shown(capsys):
    rows, batches, counted = [(str(i), "x " * n + "y") for i, n in enumerate((5, 1, 4, 2, 3))], [], []

    def ask(prompts, seed):
        batches.append((prompts, seed))
        return ["no" if len(prompts[0]) == 3 else '{"prompt": "z"}'] * len(prompts)

    class Bar(tqdm):
        def update(self, n=1):
            counted.append((len(batches), n))
            super().update(n)

    with Bar(total=5) as bar:
        found = perturb.rewrite(rows, ask, read_answer, 2, 0, 2, bar)
    assert [[len(c) // 2 for c in prompts] for prompts, _ in batches] == [[1, 2], [3, 4], [5], [1, 2]]
    assert [row["id"] for row in found] == list("01234") and len({seed for _, seed in batches}) == 4
    assert [n for n in counted if n[1]] == [(2, 2), (3, 1), (4, 2)] and sum(n for _, n in counted) == 5
    said = capsys.readouterr().out
    assert "for example: {'id': '1', 'c': 'x y', 'answer': 'no', 'reason': 'not JSON'}" in said and said.count("for example") == 2


def scripted(name, instruction, device):
    """A chat model whose answers are random, by the seed, the instruction and the number of prompts; half are no use."""
    def ask(prompts, seed):
        rng = random.Random(f"{seed} {instruction} {len(prompts)}")
        return [rng.choice(["no", json.dumps(dict(prompt=f"prompt {rng.randrange(10**6)}"))]) for _ in prompts]
    return ask


@pytest.fixture
def llm(tmp_path, monkeypatch):
    """A run of perturb.main with the scripted model and parts of three prompts: its result's bytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(perturb, "load_llm", scripted)
    monkeypatch.setattr(perturb, "PART", 3)
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {i % 20}" for i in range(30)))

    def run(out, *flags):
        perturb.main(["p.txt", out, "--strategy", "llama-aesthetic", "--llm", "tiny", "--attempts", "2", *flags])
        return result(out)
    return run


def result(out):
    return open(out, "rb").read(), open(f"{out}.rejected.jsonl", "rb").read()


def in_children(*functions):
    """Runs each function in a forked process of its own, all at once: their exit codes and all that they said."""
    children, (out, into) = [], os.pipe()
    for function in functions:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                sys.stdout = sys.stderr = open(into, "w", buffering=1)
                function()
                code = 0
            except SystemExit as error:
                print(error)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(pid)
    os.close(into)
    with open(out) as said:
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children], said.read()


def test_rewritten_prompts_and_rejected_ones_together_are_all_prompts(llm, capsys):
    llm("out.jsonl", "--limit", "15")
    good, rejected = rows_of("out.jsonl"), rows_of("out.jsonl.rejected.jsonl")
    assert all(list(row) == ["id", "c", "c_minus", "strategy", "perturb_seed", "llm"] and row["llm"] == "tiny" for row in good)
    assert all(list(row)[:4] == ["id", "c", "answer", "reason"] and row["answer"] == "no" for row in rejected)
    assert len(good) + len(rejected) == 15 and len(rejected) >= 1
    said = capsys.readouterr().out
    assert f"rejected {len(rejected)} prompts, without a usable answer in up to 2 attempts: out.jsonl.rejected.jsonl\n" in said
    ids = [row["id"] for row in good + rejected]
    assert len(set(ids)) == 15 and all(row["id"] == f"{int(row['c'].split()[1]) + 1:06d}" for row in good + rejected)
    assert [row["id"] for row in good] == sorted(row["id"] for row in good)
    assert len({row["c_minus"] for row in good}) == len(good)  # no part has another one's seed
    assert f"last reasons: not JSON ({len(rejected)})\n" in said and "for example: {" in said


def test_a_finished_run_that_is_run_again_asks_nothing_and_writes_the_same(llm, monkeypatch):
    expected = llm("out.jsonl")
    monkeypatch.setattr(perturb, "load_llm", None)
    os.remove("out.jsonl.rejected.jsonl")
    assert llm("out.jsonl") == expected


def test_the_answers_depend_on_seed_and_strategy_and_not_on_the_name_of_the_file(llm):
    assert llm("a.jsonl") == llm("b.jsonl") != llm("c.jsonl", "--seed", "1")
    perturb.main(["p.txt", "d.jsonl", "--strategy", "llama-alignment", "--llm", "tiny", "--attempts", "2"])
    assert {row["c_minus"] for row in rows_of("d.jsonl")}.isdisjoint(row["c_minus"] for row in rows_of("a.jsonl"))


def as_torchrun(world, function):
    """function(rank) for each process, with what torchrun would put into its environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def process(rank):
        os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=port)
        function(rank)

    return [lambda rank=rank: process(rank) for rank in range(world)]


def test_three_processes_write_what_one_writes(llm):
    def process(rank):
        real = perturb.write_file
        mine = [f"three.jsonl.parts/part-{k:05d}.jsonl" for k in range(rank, 7, 3)]
        own = ["three.jsonl", "three.jsonl.rejected.jsonl", "three.jsonl.parts/settings.json"] if rank == 0 else []

        def write_file(path, text):
            assert path in mine + own
            time.sleep(0.1 * rank)  # the first one has to wait for the others
            real(path, text)

        perturb.write_file = write_file
        perturb.main(["p.txt", "three.jsonl", "--strategy", "llama-aesthetic", "--llm", "tiny", "--attempts", "2"])

    codes, said = in_children(*as_torchrun(3, process))
    assert codes == [0, 0, 0] and said.count("wrote three.jsonl") == 1, said
    assert result("three.jsonl") == llm("one.jsonl")


def test_random_removal_under_torchrun_is_done_by_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a prompt of words\n")
    monkeypatch.setenv("RANK", "1")
    perturb.main(["p.txt", "out.jsonl"])
    assert os.listdir() == ["p.txt"]


def test_killed_at_every_single_file_operation_it_goes_on_to_the_same_result(llm):
    expected, asked = llm("expected.jsonl"), []
    open("p.jsonl", "w").writelines(json.dumps(dict(c=f"prompt {i}")) + "\n" for i in range(20))

    def killed_at(n):
        count = 0

        def hook(event, arguments):
            nonlocal count
            if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") or (
                    event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_CREAT)):
                count += str(arguments[0]).startswith("out.jsonl") or event in ("os.remove", "os.rmdir")  # those of rmtree
                if count == n:
                    os._exit(9)

        sys.addaudithook(hook)
        llm("out.jsonl")

    def again():
        def load(*how):
            ask = scripted(*how)
            return lambda prompts, seed: asked.append(prompts) or ask(prompts, seed)
        perturb.load_llm = load
        there = [name for name in os.listdir("out.jsonl.parts") if name.startswith("part-") and name.endswith(".jsonl")]
        there = [f"out.jsonl.parts/{name}" for name in there] + ["p.jsonl"] * os.path.exists("out.jsonl")
        done = {row["c"] for path in there for row in rows_of(path)}
        llm("out.jsonl")
        assert done.isdisjoint(sum(asked, []))  # what was there was not made again

    for n in range(1, 100):
        [code], said = in_children(lambda n=n: killed_at(n))
        if code == 0:
            break
        assert code == 9, said
        os.makedirs("out.jsonl.parts", exist_ok=True)
        [code], said = in_children(again)
        assert code == 0, said
        assert result("out.jsonl") == expected
        os.remove("out.jsonl")
        shutil.rmtree("out.jsonl.parts")
    assert 20 < n < 60


def test_a_full_disk_is_one_sentence_and_what_was_written_stays(llm):
    expected = llm("expected.jsonl")

    def limited(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        llm("out.jsonl")

    for size, said in ((100, "cannot read or write: [Errno 27] File too large: 'out.jsonl.parts/"), (len(expected[0]) - 1, "cannot read or write: [Errno 27] File too large: 'out.jsonl'")):
        codes, output = in_children(lambda size=size: limited(size))
        assert codes == [1] and said in output and "Traceback" not in output
    assert len([name for name in os.listdir("out.jsonl.parts") if name.endswith(".jsonl")]) == 7
    assert llm("out.jsonl") == expected


def test_a_rewritten_prompt_needs_a_content_word_of_c_for_alignment_and_not_for_aesthetics(llm, monkeypatch):
    monkeypatch.setattr(perturb, "load_llm", lambda *_: lambda prompts, seed: ['{"prompt": "an animal"}'] * len(prompts))
    llm("aesthetic.jsonl")
    assert len(rows_of("aesthetic.jsonl")) == 20 and not rows_of("aesthetic.jsonl.rejected.jsonl")
    with pytest.raises(SystemExit, match="^tiny gave no usable answer"):
        llm("alignment.jsonl", "--strategy", "llama-alignment")
    assert {row["reason"] for row in rows_of("alignment.jsonl.rejected.jsonl")} == {"no content word of c"}


def test_parts_that_were_begun_otherwise_are_refused_and_stay(llm):
    def stopped():
        write_file = perturb.write_file
        perturb.write_file = lambda path, text: os._exit(9) if path.endswith("part-00002.jsonl") else write_file(path, text)
        llm("out.jsonl")

    assert in_children(stopped)[0] == [9]
    before = sorted(set(os.listdir("out.jsonl.parts")) - {".lock"})
    for flags, said in ((["--seed", "1"], "perturb_seed 0, not 1"), (["--llm", "other"], "llm tiny, not other"), (["--limit", "19"], "other prompts than now: use the same again"),
                        (["--batch-size", "65"], "batch_size 64, not 65"), (["--attempts", "3"], "attempts 2, not 3"),
                        (["--strategy", "llama-alignment"], "strategy llama-aesthetic, not llama-alignment")):
        with pytest.raises(SystemExit, match=f"out.jsonl.parts was begun with {said}"):
            llm("out.jsonl", *flags)
    with holding("out.jsonl.parts"), pytest.raises(SystemExit, match="another process is writing into out.jsonl.parts"):
        llm("out.jsonl")
    assert sorted(set(os.listdir("out.jsonl.parts")) - {".lock"}) == before and len(before) == 3
    assert llm("out.jsonl") == llm("expected.jsonl")
    os.makedirs("mine.jsonl.parts")
    open("mine.jsonl.parts/letter.txt", "w").close()
    with pytest.raises(SystemExit, match="move it away"):
        llm("mine.jsonl")


@pytest.mark.parametrize("flags, message", [
    (["--llm", "x"], "--llm does not go with --strategy random-removal"), (["--attempts", "3"], "--attempts does not"),
    (["--batch-size", "1"], "--batch-size does not"), (["--strategy", "llama-alignment", "--low", "0.4"], "--low does not go with --strategy llama-al"),
    (["--strategy", "llama-aesthetic", "--high", "0.7"], "--high does not"), (["--variants", "2"], "unrecognized arguments: --variants"),
    (["--low", "0.4", "--strategy", "llama-aesthetic"], "--low does not"), (["--limit", "0"], "--limit: must be 1 or more"),
    (["--strategy", "llama-aesthetic", "--attempts", "0"], "--attempts: must be 1 or more"),
    (["--strategy", "llama-aesthetic", "--batch-size", "0"], "--batch-size: must be 1 or more"),
    (["--strategy", "llama-aesthetic", "--llm", "none"], "--llm none cannot be read ("),
    (["--strategy", "llama-aesthetic", "--llm", "."], "--llm . cannot be read ("),
])
def test_flags_that_cannot_apply_are_named(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a prompt of words\n")
    with pytest.raises(SystemExit) as stop:
        perturb.main(["p.txt", "out.jsonl", *flags])
    assert message in f"{stop.value} {capsys.readouterr().err}"
    assert not os.path.exists("out.jsonl")


def make_llama(folder, template, *special):
    """A folder of the real class with small random weights; its tokenizer knows bytes and, like Llama 3's, no padding."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(letters)}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|bos|>", eos_token="<|eot|>")
    tokenizer.chat_template = template
    tokenizer.add_special_tokens(dict(additional_special_tokens=list(special)))
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|eot|>' }}{% endfor %}"
            "{{ 'assistant: ' if add_generation_prompt }}{{ '<thinks>' if enable_thinking is not defined or enable_thinking }}")


def test_the_nonsense_of_a_random_llama_is_all_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama("llama", TEMPLATE)
    (tmp_path / "p.txt").write_text("a red fox\n\nhorse\n")
    with pytest.raises(SystemExit, match="^llama gave no usable answer; out.jsonl was not written.$"):
        perturb.main(["p.txt", "out.jsonl", "--strategy", "llama-alignment", "--llm", "llama", "--attempts", "1"])
    assert [(row["id"], row["c"], row["reason"]) for row in rows_of("out.jsonl.rejected.jsonl")] == [
        ("000001", "a red fox", "not JSON"), ("000003", "horse", "not JSON")]
    assert sorted(os.listdir()) == ["llama", "out.jsonl.parts", "out.jsonl.rejected.jsonl", "p.txt"]
    with pytest.raises(SystemExit, match="^--llm lama cannot be read"):
        perturb.main(["p.txt", "typo.jsonl", "--strategy", "llama-alignment", "--llm", "lama", "--attempts", "1"])
    assert not os.path.exists("typo.jsonl.parts")  # so that the right name can be given next
    make_llama("plain", None)
    with pytest.raises(SystemExit, match="--llm plain has no chat template"):
        perturb.main(["p.txt", "plain.jsonl", "--strategy", "llama-alignment", "--llm", "plain"])


def test_a_chat_model_is_asked_by_its_own_template_padded_on_the_left_and_answers_by_the_seed(tmp_path, monkeypatch):
    tokenizer, calls = make_llama(tmp_path / "llama", TEMPLATE), []
    real = transformers.LlamaForCausalLM.generate

    def generate(self, **how):
        calls.append(how)
        assert self.dtype == torch.float32  # on a CPU
        out = real(self, **how | dict(max_new_tokens=8))
        out[:, -1] = tokenizer.eos_token_id
        return out

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", generate)
    ask = load_llm(str(tmp_path / "llama"), "Do it.", torch.device("cpu"))
    prompts = ['say "ä"', "a much longer prompt <|eot|>", "three"]
    answers = ask(prompts[:2], 5) + ask(prompts[2:], 5)
    assert answers[:2] == ask(prompts[:2], 5) != ask(prompts[:2], 6) and all(len(answer) < 30 for answer in answers)
    assert len(calls) == 4
    for i, c in enumerate(prompts):
        how, k = calls[i // 2], i % 2
        assert how["do_sample"] and how["temperature"] == 0.7 and how["max_new_tokens"] == 256
        text, mask = how["input_ids"][k], how["attention_mask"][k].bool()
        assert mask[-1] and (mask.sum() < len(mask)) == (i == 0)  # padded on the left, where another one is longer
        content = "Do it.\n\n" + json.dumps(dict(prompt=c), ensure_ascii=False)
        assert tokenizer.decode(text[mask]) == f"<|bos|>user: {content}<|eot|>assistant: "
        assert (text[mask] == tokenizer.eos_token_id).sum() == 1  # that of the prompt is but text
    assert not any("Do it" in answer or "<|" in answer for answer in answers)


LLAMA_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT = "<|begin_of_text|>\n<|start_header_id|>system<|end_header_id|>\nSay less.\nexample:\n\nprompt: a fox"


def test_a_template_that_is_a_whole_chat_is_read_as_it_is_with_the_prompt_after_it(tmp_path, monkeypatch):
    tokenizer, seen = make_llama(tmp_path / "llama", None, *LLAMA_3), []

    def generate(self, input_ids, attention_mask, **how):
        seen.extend(ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask))
        return torch.cat([input_ids, input_ids[:, -1:]], 1)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", generate)
    load_llm(str(tmp_path / "llama"), CHAT, torch.device("cpu"))(["a cat", "end <|eot_id|><|start_header_id|>"], 0)
    for ids, c in zip(seen, ("a cat", "end < |eot_id|>< |start_header_id|>")):
        assert tokenizer.decode(ids) == f"{CHAT}\nprompt: {c}\n<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n"
        assert [int((ids == tokenizer.convert_tokens_to_ids(token)).sum()) for token in LLAMA_3] == [1, 2, 2, 1]  # no sign of the prompt's
    make_llama(tmp_path / "other", TEMPLATE)
    with pytest.raises(UserError, match="the template is a chat of Llama 3, but --llm .*other does not know its token <|start_header_id|>"):
        load_llm(str(tmp_path / "other"), CHAT, torch.device("cpu"))


def test_rows_say_which_template_was_used_and_the_models_empty_lists_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = []

    def load(name, instruction, device):
        told.append(instruction)
        return lambda prompts, seed: [json.dumps(dict(neg_prompts=[c.split()[0], c.split()[-1]] * ("owl" not in c))) for c in prompts]

    monkeypatch.setattr(perturb, "load_llm", load)
    open("p.txt", "w").write("red fox\nowl tree\nold boat\n")
    open("template.txt", "w", encoding="utf-8").write("  Sag weniger: ä\n")
    command = ["p.txt", "out.jsonl", "--strategy", "llama-alignment", "--llm", "tiny", "--template", "template.txt"]
    perturb.main(command)
    how = f"llama-alignment, template {hashlib.sha256(open('template.txt', 'rb').read()).hexdigest()[:16]}"
    assert told == ["  Sag weniger: ä\n"] and {row["strategy"] for row in rows_of("out.jsonl") + rows_of("out.jsonl.rejected.jsonl")} == {how}
    assert [row["c"] for row in rows_of("out.jsonl")] == ["red fox", "old boat"] and rows_of("out.jsonl.rejected.jsonl")[0]["reason"] == VAGUE
    assert f"last reasons: {VAGUE} (1)\n" in capsys.readouterr().out
    open("template.txt", "a").write("!")
    with pytest.raises(SystemExit, match="begun with strategy llama-alignment, template .*, not llama-alignment, template"):
        perturb.main(command)
    os.remove("template.txt")
    with pytest.raises(SystemExit, match=r"^template.txt cannot be read \(.*No such file or directory.*\): it must be a text file in UTF-8.$"):
        perturb.main(command)
    with pytest.raises(SystemExit, match="--template does not go with --strategy random-removal"):
        perturb.main(["p.txt", "new.jsonl", "--template", "template.txt"])


def test_no_code_and_no_pickle_of_a_chat_model_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama("llama", TEMPLATE)
    for file, names in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        config = json.load(open(f"llama/{file}")) | dict(auto_map={names: "evil.Evil" if "Model" in names else ["evil.Evil", None]})
        json.dump(config, open(f"llama/{file}", "w"))
    open("llama/evil.py", "w").write(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Evil: pass\n")
    load_llm("llama", "", torch.device("cpu"))
    os.rename("llama/model.safetensors", "llama/pytorch_model.bin")
    with pytest.raises(UserError, match=r"--llm llama cannot be read \(.*safetensors.*\): it must be a chat model's folder or hub id, with safetensors"):
        load_llm("llama", "", torch.device("cpu"))
    assert not os.path.exists("executed")


def test_two_processes_with_a_real_llama_write_what_one_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(perturb, "PART", 2)
    make_llama("llama", TEMPLATE)
    (tmp_path / "p.txt").write_text("a red fox\ntwo cats\nan old boat\n")
    flags = ["--strategy", "llama-alignment", "--llm", "llama", "--attempts", "1"]
    for out, world in (("one.jsonl", 1), ("two.jsonl", 2)):
        codes, said = in_children(*as_torchrun(world, lambda rank, out=out: perturb.main(["p.txt", out, *flags])))
        assert codes[0] == 1 and said.count(f"llama gave no usable answer; {out} was not written.") == 1, said
    one, two = (open(f"{out}.jsonl.rejected.jsonl", "rb").read() for out in ("one", "two"))
    assert one == two and one.count(b"\n") == 3
