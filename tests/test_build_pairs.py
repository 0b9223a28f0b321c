"""build_pairs.py: the right latents for c and c_minus or for two images, and one store whatever happens on the way."""

import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys

import launch
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny_models
import torch
from conftest import read_folder
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import build_pairs
import perturb
from lib import models, plots
from lib.files import UserError, checksum
from lib.images import image_bytes, open_rgb, read_image_pairs, read_pair
from lib.pairs import PairStore, shard_path
from lib.processes import holding

STEPS = ["--steps", "2", "--shard-size", "3"]
DEFAULTS = dict(  # steps, guidance, sampler, factor, shift
    sd=(25, 7.5, "PNDMScheduler", 0.18215, 0), sd2=(25, 7.5, "DDIMScheduler", 0.18215, 0),
    sdxl=(25, 5.0, "EulerDiscreteScheduler", 0.13025, 0), sana=(20, 4.5, "DPMSolverMultistepScheduler", 0.41407, 0),
    sd3=(25, 5.0, "FlowMatchEulerDiscreteScheduler", 1.5305, 0.0609))


def build(model, out, *flags):
    build_pairs.main(["--model", str(model), "--out", str(out), *map(str, flags)])


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def vouch(folder, *shards):
    """Puts the checksums of the table and of these shards, as they are now, into meta.json."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["table"] = checksum(folder / "pairs.jsonl")
    for s in shards:
        meta["checksums"][s] = checksum(shard_path(folder, s))
    (folder / "meta.json").write_text(json.dumps(meta))


def problems_of(store):
    """The sentences of --inspect on what is wrong with a store; none if it is whole."""
    try:
        build_pairs.main(["--inspect", str(store)])
    except SystemExit as error:
        *problems, last = str(error).splitlines()
        assert last.startswith(f"{store}: {len(problems)} problem")
        return problems
    assert os.path.exists(f"{store}.png")
    return []


def stop_at_call(monkeypatch, number):
    """From here on make_shard stops the run when it is called for the number-th time. The first id of each call."""
    real, made = build_pairs.make_shard, []

    def make_shard(model, rows, *rest):
        made.append(rows[0]["id"])
        if len(made) == number:
            raise KeyboardInterrupt
        return real(model, rows, *rest)

    monkeypatch.setattr(build_pairs, "make_shard", make_shard)
    return made


@pytest.fixture(scope="module", params=DEFAULTS)
def family(request, tmp_path_factory):
    """The name of each family and the folder of a small model of it."""
    folder = str(tmp_path_factory.mktemp("models") / request.param)
    tiny_models.make(folder, request.param)
    return request.param, folder


def test_prompts_become_the_pipelines_own_latents_for_c_and_c_minus_with_the_familys_settings(family, tmp_path, monkeypatch):
    (name, folder), (steps, guidance, sampler, factor, shift) = family, DEFAULTS[family[0]]
    rows = [dict(id=f"p{i}", c=f"{x} on a hill", c_minus=x[:5]) for i, x in enumerate(["a red fox", "two cups", "öld 舟"])]
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "perturbed.jsonl", rows)
    build_pairs.main(["--model", folder + "/", "--seed", "5", "--batch-size", "2"])  # all else by default
    store, pipe = PairStore(f"pairs/{name}"), DiffusionPipeline.from_pretrained(folder)
    expected = dict(model=folder, steps=steps, guidance=guidance, sampler=sampler, seed=5, scale=[factor, shift], pairs=3,
                    shard_size=128, dtype="float32", negatives="generated", latents=[16 if name == "sd3" else 4, 8, 8])
    assert {key: store.meta[key] for key in expected} == expected and len(store) == 3
    x_T = torch.tensor(np.stack([np.random.default_rng(5 + i).standard_normal(expected["latents"], "f4") for i in range(3)]))
    found = [torch.stack(x) for x in zip(*[store[i][1:] for i in range(3)])]
    for x_0, key in zip(found, ("c", "c_minus")):
        direct = pipe([row[key] for row in rows], latents=x_T, num_inference_steps=steps, guidance_scale=guidance, height=64,
                      width=64, output_type="latent", **dict(use_resolution_binning=False) if name == "sana" else {}).images
        torch.testing.assert_close(x_0, direct, rtol=1e-3, atol=1e-3)
    assert (found[0] - found[1]).abs().amax((1, 2, 3)).min() > 0.01
    assert [store[i][0] for i in range(3)] == [row | dict(noise_seed=5 + i, shard=0, row=i) for i, row in enumerate(rows)]


def test_a_store_says_how_its_prompts_were_degraded(sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open("p.txt", "w").write("a red fox on a hill\nan old boat by the sea\n")
    perturb.main(["p.txt", "perturbed.jsonl", "--seed", "3"])
    build(sd, "store", "--steps", 1, "--seed", 7)
    rows = PairStore("store").rows
    assert [(row["strategy"], row["perturb_seed"], row["noise_seed"]) for row in rows] == [("random-removal", 3, 7), ("random-removal", 3, 8)]
    write_lines(tmp_path / "mine.jsonl", [dict(id="x", c="a fox", c_minus="fox", extra=1)])
    build(sd, "own", "--prompts", "mine.jsonl", "--steps", 1)
    assert PairStore("own").rows == [dict(id="x", c="a fox", c_minus="fox", noise_seed=0, shard=0, row=0)]


def test_prompts_that_differ_only_where_the_model_reads_no_further_are_refused_by_name(sd, tmp_path):
    rows = [dict(id=f"p{n}", c="x " * n + "end", c_minus="x " * n) for n in (73, 74, 75, 76)]  # 77 tokens, 2 of them marks
    with pytest.raises(SystemExit) as stop:
        build(sd, tmp_path / "store", "--prompts", write_lines(tmp_path / "long.jsonl", rows), *STEPS)
    *bad, last = str(stop.value).splitlines()
    assert [re.search(r"long.jsonl: (.*): c and c_minus are the same in the tokens that the model reads", line)[1] for line in bad] == ["p75", "p76"]
    assert last.startswith("2 bad lines in") and not os.path.exists(tmp_path / "store")


def test_winners_only_are_the_winners_of_the_pairs(sd, prompts, pairs, tmp_path):
    build(sd, tmp_path / "store", "--prompts", prompts, "--negatives", "none", *STEPS)
    winners, both = PairStore(tmp_path / "store"), PairStore(pairs)
    for i in range(10):
        (row, x_0_w, x_0_l), (expected_row, expected, _) = winners[i], both[i]
        torch.testing.assert_close(x_0_w, expected, rtol=1e-3, atol=1e-3)
        assert row == expected_row and x_0_l is None
    assert len(winners) == 10 and problems_of(tmp_path / "store") == []
    with pytest.raises(SystemExit, match="begun with negatives none, not generated"):
        build(sd, tmp_path / "store", "--prompts", prompts, *STEPS)


def test_latents_that_are_not_finite_are_not_stored_or_left_out(sd, prompts, pairs, tmp_path, monkeypatch, capsys):
    real = models.sample

    def sample(model, c, x_T, *settings):
        x_0 = real(model, c, x_T, *settings)
        x_0[min(len(x_T) // 2 + 1, len(x_T) - 1), 0, 0, 0] = float("nan")  # the second loser, or the only one
        return x_0

    monkeypatch.setattr(models, "sample", sample)
    with pytest.raises(SystemExit, match=r"the pairs \['p1'\] are not finite. Give --skip-bad, which leaves them out"):
        build(sd, tmp_path / "store", "--prompts", prompts, *STEPS)
    assert sorted(read_folder(tmp_path / "store")) == ["meta.json", "pairs.jsonl"]
    build(sd, tmp_path / "store", "--prompts", prompts, "--skip-bad", *STEPS)
    store, whole, kept = PairStore(tmp_path / "store"), PairStore(pairs), [0, 2, 3, 5, 6, 8]  # of the last, x_0_w is bad
    said = capsys.readouterr().out
    assert [row["id"] for row in store.rows] == [f"p{i}" for i in kept] and "store: 6 pairs in 4 shards" in said
    assert re.findall("left out 1 pair, whose latents are not finite: (.*)", said) == ["['p1']", "['p4']", "['p7']", "['p9']"]
    for i, k in enumerate(kept):
        assert store[i][0] == whole[k][0] and all((x == y).all() for x, y in zip(store[i][1:], whole[k][1:]))
    assert problems_of(tmp_path / "store") == []
    build(sd, tmp_path / "store", "--prompts", prompts, *STEPS)
    assert "is complete: 6 pairs; nothing was done" in capsys.readouterr().out


def on_white(x):
    """RGBA -> RGB, by hand."""
    alpha = x[:, :, 3:] / 255
    return np.round(x[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of four pairs of images, and {file: its pixels (64, 64, 3) as the autoencoder should see them}."""
    folder, rng, pixels, turned = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), {}, Image.Exif()

    def resized(x, *size):
        return np.array(Image.fromarray(x).resize(size, Image.Resampling.LANCZOS))

    os.mkdir(folder / "deep")
    for file, *shape, expected in (
            ("plain.png", 16, 16, 3, lambda x: x), ("wide.png", 16, 25, 3, lambda x: x[:, 18:82]),
            ("tall.png", 40, 32, 3, lambda x: resized(x, 64, 80)[8:72]), ("grey.png", 16, 16, 1, lambda x: x.repeat(3, 2)),
            ("clear.png", 16, 16, 4, on_white), ("deep/tiny.webp", 8, 10, 3, lambda x: resized(x, 80, 64)[:, 8:72]),
            ("turned-6.jpg", 16, 20, 3, lambda x: np.rot90(x[:, 8:72], -1)),  # the camera was turned, so the picture must be
            ("turned-8.jpg", 16, 20, 3, lambda x: np.rot90(x[:, 8:72]))):
        x = rng.integers(256, size=shape, dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        turned[0x112] = int(file[7]) if file.startswith("turned") else 1  # EXIF's Orientation
        Image.fromarray(x.squeeze()).save(folder / file, exif=turned)
        pixels[file] = expected(np.array(Image.open(folder / file)).reshape(x.shape))
    sides = list(zip(*[iter(pixels)] * 2))
    write_lines(folder / "metadata.jsonl", [dict(id=str(i), c="a fox", winner=w, loser=l) for i, (w, l) in enumerate(sides)])
    return folder, pixels


def test_images_become_the_means_of_their_codes_upright_cut_square_and_scaled(family, photos, tmp_path):
    (name, model), (folder, pixels), (*_, factor, shift) = family, photos, DEFAULTS[family[0]]
    for out, path in (("a", folder), ("b", folder / "metadata.jsonl")):
        build(model, tmp_path / out, "--from-images", path, "--shard-size", 3, "--batch-size", 2)
    assert read_folder(tmp_path / "a") == read_folder(tmp_path / "b")
    store, vae = PairStore(tmp_path / "a"), DiffusionPipeline.from_pretrained(model).vae
    assert store.meta["scale"] == [factor, shift] and not store.meta.keys() & {"sampler", "steps", "guidance", "seed"}
    for i, line in enumerate(open(folder / "metadata.jsonl")):
        given, (row, *x_0) = json.loads(line), store[i]
        files = {side: os.path.join(folder, given[side]) for side in ("winner", "loser")}
        assert row == given | files | dict(c_minus=None, shard=i // 3, row=i % 3)
        for side, found in zip(("winner", "loser"), x_0):
            image = torch.tensor(pixels[given[side]].copy()).permute(2, 0, 1)[None].float() / 255 * 2 - 1
            with torch.no_grad():
                code = vae.encode(image).latent if name == "sana" else vae.encode(image).latent_dist.mode()
            close = dict(atol=0.02) if given[side] == "clear.png" else dict(atol=1e-5)  # Pillow's own rounding of alpha
            torch.testing.assert_close(found, (code[0] - shift) * factor, rtol=1e-4, **close)
    assert all("deviation" in problem for problem in problems_of(tmp_path / "a"))  # random weights; a null c_minus is none


def test_all_bad_images_are_named_before_the_first_shard_and_a_stopped_run_goes_on_past_the_mended_ones(sd, photos, tmp_path, monkeypatch):
    folder = shutil.copytree(photos[0], tmp_path / "photos")
    command = [sd, tmp_path / "store", "--from-images", folder, "--shard-size", 1]
    build(sd, tmp_path / "whole", *command[2:])
    good = {name: (folder / name).read_bytes() for name in ("turned-8.jpg", "tall.png")}
    for name, content in good.items():
        (folder / name).write_bytes(content[:len(content) // 2])
    made = stop_at_call(monkeypatch, 3)
    with pytest.raises(SystemExit) as stop:
        build(*command)
    first, second, last = str(stop.value).splitlines()
    assert re.fullmatch(r"pair 1: \S*/photos/tall.png cannot be read \(\S.*\): put a whole image there, or leave the pair out.", first) and "turned-8.jpg cannot be read" in second
    assert last == "2 bad pairs: mend them, or give --skip-bad, which leaves them out." and not (made or os.path.exists(tmp_path / "store"))
    for name, content in good.items():
        (folder / name).write_bytes(content)
    with pytest.raises(SystemExit, match="stopped"):
        build(*command)
    build(*command)
    assert made == ["0", "1", "2", "2", "3"] and read_folder(tmp_path / "store") == read_folder(tmp_path / "whole")


def test_skip_bad_leaves_out_pairs_that_are_none_and_counts_them(sd, photos, tmp_path, capsys):
    folder = shutil.copytree(photos[0], tmp_path / "photos")
    build(sd, tmp_path / "whole", "--from-images", folder, "--shard-size", 2)
    (folder / "tall.png").unlink()  # the winner of the second pair
    command = [sd, tmp_path / "store", "--from-images", folder, "--shard-size", 2, "--skip-bad"]
    for _ in range(2):
        build(*command)
        said, store = capsys.readouterr().out, PairStore(tmp_path / "store")
        assert re.search(r"left out 1 bad pair of 4:\npair 1: \S*/tall.png cannot be read \(.*No such file", said)
        assert "store: 3 pairs in 2 shards" in said or "store is complete: 3 pairs; nothing was done" in said
        assert [row["id"] for row in store.rows] == ["0", "2", "3"] and len(store) == 3
        for i, k in enumerate((0, 2, 3)):
            for x, y in zip(store[i][1:], PairStore(tmp_path / "whole")[k][1:]):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit, match="1 bad pair: mend them, or give --skip-bad"):
        build(*command[:-1])
    launch.Started("build_pairs", ["--model", sd, "--out", str(tmp_path / "two"), *map(str, command[2:])], 2).wait(300)
    assert read_folder(tmp_path / "two") == read_folder(tmp_path / "store")


@pytest.mark.parametrize("damage", [
    lambda png: b"", lambda png: b"a text", lambda png: png[:len(png) // 2], lambda png: png[:20],
    lambda png: png[:11] + b"\1" + png[12:],  # Pillow: ValueError
    lambda png: b"BM" + b"\0" * 12 + b"\x28\0\0\0" + b"\0\xff\xff\0" * 2 + b"\1\0\x18" + b"\0" * 99,  # DecompressionBombError
], ids=["empty", "text", "half", "head", "head damaged", "petapixels"])
def test_an_unreadable_image_is_named(damage, photos, tmp_path):
    (tmp_path / "bad.png").write_bytes(damage((photos[0] / "plain.png").read_bytes()))
    with pytest.raises(UserError, match=r"^pair 7: \S*/bad.png cannot be read \([^<>]+\): put a whole image there, or leave the pair out\.\Z"):
        read_pair(dict(id="7", winner=str(photos[0] / "plain.png"), loser=str(tmp_path / "bad.png")))


def test_a_finished_store_has_these_files_and_is_left_alone(sd, prompts, pairs, capsys):
    names = ["meta.json", "pairs.jsonl", *[f"shard-0000{s}.safetensors" for s in range(4)]]
    before = [os.stat(os.path.join(pairs, name)) for name in names]
    assert sorted(read_folder(pairs)) == names and len({x.st_mode for x in before}) == 1  # who may read one may read all
    build(sd, pairs, "--prompts", prompts, *STEPS)
    assert f"{pairs} is complete: 10 pairs; nothing was done" in capsys.readouterr().out
    assert [os.stat(os.path.join(pairs, name)).st_mtime_ns for name in names] == [x.st_mtime_ns for x in before]


def test_a_stopped_run_goes_on_to_the_same_store(sd, prompts, pairs, tmp_path, monkeypatch):
    made = stop_at_call(monkeypatch, 3)
    with pytest.raises(SystemExit, match="stopped. The same command goes on"):
        build(sd, tmp_path / "store", "--prompts", prompts, *STEPS)
    with pytest.raises(UserError, match="store is not finished: run the build_pairs.py command"):
        PairStore(tmp_path / "store")
    build(sd, tmp_path / "store", "--prompts", prompts, *STEPS)
    assert made == ["p0", "p3", "p6", "p6", "p9"]  # nothing is made twice but what was in the making
    assert read_folder(tmp_path / "store") == read_folder(pairs)


def killed_at(n, out, *arguments):
    """Forks a run that dies before its n-th change to a file under `out`, half of what it was to rename being lost; the
    exit code, 9 if it died. The beginning of a shard counts too."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(60)
    changes, real = itertools.count(1), build_pairs.make_shard

    def hook(event, details):
        write = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "test.shard") or (
            event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR))
        if write and str(details[0]).startswith(out) and next(changes) == n:
            if event == "os.rename":
                os.truncate(details[0], os.path.getsize(details[0]) // 2)
            os._exit(9)

    try:
        build_pairs.make_shard = lambda *rest: sys.audit("test.shard", out) or real(*rest)
        sys.addaudithook(hook)
        build(*arguments)
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_at_any_change_to_any_file_it_goes_on_to_the_same_store(sd, prompts, tmp_path, monkeypatch):
    given, model = tmp_path / "four.jsonl", models.load(sd)
    given.write_text("".join(open(prompts).readlines()[:4]))
    monkeypatch.setattr(models, "load", lambda *_: model)  # once for all
    flags = ["--prompts", given, "--steps", 1, "--shard-size", 2]
    build(sd, tmp_path / "whole", *flags)
    for n in itertools.count(1):
        out = str(tmp_path / f"store-{n}")
        code = killed_at(n, out, sd, out, *flags)
        if code == 9:
            if os.path.exists(f"{out}/meta.json") and None not in json.load(open(f"{out}/meta.json")).get("checksums", [None]):  # only the lock was left
                assert [PairStore(out)[i][0]["id"] for i in range(4)] == ["p0", "p1", "p2", "p3"]
            else:
                with pytest.raises(UserError, match="is not finished|meta.json cannot be read"):
                    PairStore(out)
            build(sd, out, *flags)
        assert read_folder(out) == read_folder(tmp_path / "whole")
        if code != 9:
            break
    assert code == 0 and n > 13  # the folder, and opening and renaming 3 files that are written 4 times at least


@pytest.mark.parametrize("damage", ["junk", "zeros", "empty", "half", "NaN", "a missing key", "float16", "reversed", "no checksum"])
def test_a_shard_of_an_unfinished_store_that_is_not_what_was_written_is_made_again(damage, sd, prompts, pairs, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped"):
        stop_at_call(patch, 3)
        build(sd, tmp_path / "store", "--prompts", prompts, *STEPS)
    path, meta = (str(tmp_path / "store" / name) for name in ("shard-00001.safetensors", "meta.json"))
    content, x_0, noted = open(path, "rb").read(), load_file(path), json.load(open(meta))
    assert noted["checksums"] == [checksum(shard_path(tmp_path / "store", 0)), checksum(path), None, None]
    bytes_of = dict(junk=b"junk", zeros=bytes(len(content)), empty=b"", half=content[:len(content) // 2])
    changes = {"NaN": lambda x: x * torch.nan, "float16": lambda x: x.half(), "reversed": lambda x: x.flip(0)}
    if damage in bytes_of:
        open(path, "wb").write(bytes_of[damage])
    elif damage in changes:
        save_file({name: changes[damage](x).contiguous() for name, x in x_0.items()}, path)
    elif damage == "a missing key":
        save_file(dict(x_0_w=x_0["x_0_w"]), path)
    else:  # killed before it was noted
        noted["checksums"][1] = None
        json.dump(noted, open(meta, "w"), indent=1)
    capsys.readouterr()
    made = stop_at_call(monkeypatch, 9)
    build(sd, tmp_path / "store", "--prompts", prompts, *STEPS)
    assert made == ["p3", "p6", "p9"] and f"{path} is damaged or was not finished: it is made again\n" in capsys.readouterr().out
    assert read_folder(tmp_path / "store") == read_folder(pairs)


def test_two_processes_make_the_same_store(sd, prompts, pairs, tmp_path):
    out = str(tmp_path / "store")  # judged by what it wrote: gloo processes sometimes abort after all is done
    _, said = launch.run("build_pairs", ["--model", sd, "--prompts", prompts, "--out", out, *STEPS], processes=2)
    assert read_folder(out) == read_folder(pairs) and " 6/6 [" in said  # the first has two of four shards


def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(sd, prompts, pairs, tmp_path, monkeypatch):
    out, (soft, hard), whole = tmp_path / "store", resource.getrlimit(resource.RLIMIT_FSIZE), read_folder(pairs)
    for most, file in ((100, "meta.json"), (1000, "pairs.jsonl"), (3000, "shard-00000.safetensors"), (3000, "shard-00002.safetensors")):
        if "2" in file:
            with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped"):
                stop_at_call(patch, 3)
                build(sd, out, "--prompts", prompts, *STEPS)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))  # no file can grow larger
        try:
            with pytest.raises(SystemExit, match=rf"^cannot read or write: .*File too large: '\S*{file}'.*\Z"):
                build(sd, out, "--prompts", prompts, *STEPS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = {name: content for name, content in read_folder(out).items() if name.endswith("safetensors")}
    assert kept == {name: whole[name] for name in ("shard-00000.safetensors", "shard-00001.safetensors")}
    build(sd, out, "--prompts", prompts, *STEPS)
    assert read_folder(out) == whole


def test_a_second_writer_is_refused(sd, prompts, tmp_path):
    with holding(str(tmp_path / "store")), pytest.raises(SystemExit, match="another process is writing into .*store"):
        build(sd, tmp_path / "store", "--prompts", prompts, *STEPS)
    build(sd, tmp_path / "store", "--prompts", prompts, *STEPS)
    assert len(PairStore(tmp_path / "store")) == 10


@pytest.fixture
def copy(pairs, tmp_path):
    """A copy of the pair store, to be damaged."""
    return shutil.copytree(pairs, tmp_path / "copy")


def test_a_damaged_or_missing_shard_is_noticed_and_made_again_when_deleted(sd, prompts, pairs, copy):
    shard, other = copy / "shard-00001.safetensors", copy / "shard-00002.safetensors"
    data, good = bytearray(shard.read_bytes()), other.read_bytes()
    data[-7] ^= 1
    for damage in (bytes(data), data[:500], b"", None):
        shard.write_bytes(damage) if damage is not None else shard.unlink()
        assert PairStore(copy)[0][0]["id"] == "p0"
        with pytest.raises(UserError, match="shard-00001.safetensors is missing or damaged: delete it"):
            PairStore(copy)[3]
        if damage is not None:
            with pytest.raises(SystemExit, match="shard-00001.safetensors is missing or damaged"):
                build(sd, copy, "--prompts", prompts, *STEPS)
    other.write_bytes(good[:-1] + b"x")  # must not be vouched for when another shard is made again
    with pytest.raises(SystemExit, match="shard-00002.safetensors is missing or damaged"):
        build(sd, copy, "--prompts", prompts, *STEPS)
    assert not shard.exists()  # before anything is made again: another machine may not make it to the last bit
    other.write_bytes(good)
    build(sd, copy, "--prompts", prompts, *STEPS)
    assert read_folder(copy) == read_folder(pairs)


def test_a_changed_table_or_meta_is_noticed(sd, prompts, copy):
    table = (copy / "pairs.jsonl").read_text()
    for change in (table.replace("fox", "wolf"), table[:300], "", None):
        (copy / "pairs.jsonl").write_text(change) if change is not None else (copy / "pairs.jsonl").unlink()
        with pytest.raises(UserError, match="pairs.jsonl is missing or was changed"):
            PairStore(copy)
    meta = json.loads((copy / "meta.json").read_text())
    wrong = [dict(checksums=[]), dict(checksums=5), dict(shard_size=0), dict(shard_size="3"), dict(negatives="x"), dict(model=5), dict(left_out=5)]
    for change in ("", "{", "[1]", "{}", table, *[json.dumps(meta | change) for change in wrong]):
        (copy / "meta.json").write_text(change)
        for read in (lambda: PairStore(copy), lambda: build(sd, copy, "--prompts", prompts, *STEPS)):
            with pytest.raises((UserError, SystemExit), match=f"^{copy}/meta.json cannot be read .*: give a pair store, or make the pairs in a new folder.$"):
                read()


def scaled(x, deviation):
    return x * deviation / x.std()


BAD_SHARDS = {  # what it does to the first shard's x_0_w and x_0_l, of 3 pairs: how it is refused
    "zero": (lambda w, l: dict(x_0_w=w, x_0_l=torch.stack([l[0], 0 * l[1], l[2]])), r"x_0_l of the pair p1 has a deviation of 0, which no scaled latents have"),
    "constant": (lambda w, l: dict(x_0_w=w * 0 + 7, x_0_l=l), r"x_0_w of the pair p0 has a deviation of 0,"),
    "huge": (lambda w, l: dict(x_0_w=torch.cat([w[:2], scaled(w[2:], 31)]), x_0_l=l), r"x_0_w of the pair p2 has a deviation of 31,"),
    "narrow": (lambda w, l: dict(x_0_w=w[..., :7].contiguous(), x_0_l=l), r"shape '\[3, 4, 8, 8\]' is invalid for input of size 672"),
    "a pair too many": (lambda w, l: dict(x_0_w=torch.cat([w, w]), x_0_l=l), r"shape '\[3, 4, 8, 8\]' is invalid for input of size 1536"),
    "no losers": (lambda w, l: dict(x_0_w=w), r".*x_0_l"),
    "good": (lambda w, l: dict(x_0_w=scaled(w, 0.05).half(), x_0_l=torch.stack([scaled(x, 29) for x in l])), None)}


@pytest.mark.parametrize("damage", BAD_SHARDS)
def test_latents_that_can_be_none_are_refused_when_their_shard_is_opened_though_it_has_its_checksum(damage, copy):
    change, message = BAD_SHARDS[damage]
    save_file(change(*map(load_file(shard_path(copy, 0)).get, ("x_0_w", "x_0_l"))), shard_path(copy, 0))
    vouch(copy, 0)
    store = PairStore(copy)
    assert store[3][1].shape == (4, 8, 8)
    if message is None:
        assert store[0][1].shape == (4, 8, 8)
    else:
        with pytest.raises(UserError, match=rf"^\S*/shard-00000.safetensors cannot be read \({message}.*\): make the pairs in a new folder.$"):
            store[0]


def test_a_check_names_everything_that_is_wrong_and_nothing_else(sd, prompts, pairs, tmp_path):
    assert problems_of(pairs) == []
    out = tmp_path / "store"
    build(sd, out, "--prompts", prompts, "--steps", 1, "--shard-size", 1)
    rows = [json.loads(line) for line in open(out / "pairs.jsonl")]
    rows[2] |= dict(c="a red hat", c_minus="A  red hat")
    rows[9] |= dict(c="x " * 75 + "fox", c_minus="x " * 75 + "cup")
    write_lines(out / "pairs.jsonl", rows)
    changes = {  # of x_0_w and x_0_l of a shard, with its checksum
        3: lambda w, l: dict(x_0_w=scaled(w, 40), x_0_l=l), 4: lambda w, l: dict(x_0_w=w, x_0_l=l.double()),  # good
        5: lambda w, l: dict(x_0_w=w, x_0_l=l.where(l < l.max(), torch.nan)), 6: lambda w, l: dict(x_0_w=w)}
    for s, change in changes.items():
        x_0 = load_file(shard_path(out, s))
        save_file(change(x_0["x_0_w"], x_0["x_0_l"]), shard_path(out, s))
    vouch(out, *changes)
    os.remove(shard_path(out, 0))
    os.truncate(shard_path(out, 8), os.path.getsize(shard_path(out, 8)) - 8)
    with open(shard_path(out, 1), "rb+") as file:
        last = file.read()[-1]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps(meta | dict(scale=[1.0, 0.0])))
    expected = ["pair p2: c and c_minus are the same to the model", "pair p9: c and c_minus are the same", rf"{out}: it holds latents .* of scale \[1.0, 0.0\]",
                r"0\.\S+ is missing or damaged", r"1\.\S+ is missing or damaged", r"3\.\S+ cannot be read \(x_0_w of the pair p3 has a deviation of 40,",
                r"5\.\S+ cannot be read \(x_0_l of the pair p5 has a deviation of nan,", r"6\.\S+ cannot be read \(.*x_0_l", r"8\.\S+ is missing or damaged"]
    found = problems_of(out)
    assert len(found) == len(expected) and all(re.search(wanted, line) for wanted, line in zip(expected, found)), found


def test_a_folder_with_other_files_is_not_made_a_store(sd, prompts, copy, tmp_path):
    (copy / "meta.json").unlink()  # its shards could be of any settings
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text(open(prompts).read())  # a user's own file of that name
    for out, given in ((copy, prompts), (tmp_path / "data", tmp_path / "data" / "pairs.jsonl")):
        before = read_folder(out)
        with pytest.raises(SystemExit, match="holds other files and no meta.json"):
            build(sd, out, "--prompts", given, *STEPS)
        assert read_folder(out) == before
        assert not os.path.exists(out / ".lock")


GOOD = dict(id="1", c="a fox", winner="plain.png", loser="wide.png")


def test_a_store_is_not_continued_with_other_settings_prompts_or_images(sd, prompts, photos, pairs, tmp_path):
    (tmp_path / "other.jsonl").write_text(open(prompts).read().replace("fox", "wolf"))
    ten = write_lines(photos[0] / "ten.jsonl", [GOOD | dict(id=str(i)) for i in range(10)])
    ours = ["--prompts", prompts, *STEPS]
    for flags, message in (
            ([*ours, "--guidance", 3], "guidance 7.5, not 3.0"), ([*ours, "--steps", 4], "steps 2, not 4"),
            ([*ours, "--seed", 1], "seed 0, not 1"), ([*ours, "--shard-size", 5], "shard_size 3, not 5"),
            ([*ours, "--prompts", tmp_path / "other.jsonl"], "other prompts than .*other.jsonl has"),
            (["--from-images", ten, "--shard-size", 3], "other prompts than .*ten.jsonl has")):
        with pytest.raises(SystemExit, match=f"^{pairs} was begun with {message}: use the same again"):
            build(sd, pairs, *flags)


def test_a_store_goes_on_with_the_same_weights_only_whatever_their_folder_is_called(sd, prompts, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-sd", "moved"):
        shutil.copytree(sd, name)
    given = ["--prompts", prompts, "--steps", 2, "--shard-size", 3]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped"):
        stop_at_call(patch, 2)
        build("tiny-sd", "store", *given)
    tiny_models.make("tiny-sd", seed=1)  # other weights under the same name
    before = read_folder("store")
    with pytest.raises(SystemExit, match="^store was begun with other weights than now: use the same again, or another folder.$"):
        build("tiny-sd", "store", *given)
    assert read_folder("store") == before
    for name in ("./moved", "moved/", tmp_path / "moved"):
        build(name, "store", *given)
    whole = read_folder(pairs)
    made = read_folder("store")
    assert {name: x for name, x in made.items() if name != "meta.json"} == {name: x for name, x in whole.items() if name != "meta.json"}
    assert json.loads(made["meta.json"]) == json.loads(whole["meta.json"]) | dict(model=str(tmp_path / "tiny-sd"))
    assert json.loads(made["meta.json"])["weights"] == models.model_checksum(models.load("moved"))


def test_an_empty_c_minus_is_the_null_prompt_and_is_counted(sd, tmp_path, capsys):
    rows = [dict(id=str(i), c=f"a fox {i}", c_minus=c_minus) for i, c_minus in enumerate(["", "fox", " "])]
    build(sd, tmp_path / "store", "--prompts", write_lines(tmp_path / "p.jsonl", rows), "--steps", 1)
    assert "2 pairs of 3 with an empty c_minus, which is the null prompt\n" in capsys.readouterr().out
    assert [row["c_minus"] for row in PairStore(tmp_path / "store").rows] == ["", "fox", ""]


def test_an_image_that_was_replaced_is_noticed_when_the_command_is_given_again(sd, photos, tmp_path):
    folder = shutil.copytree(photos[0], tmp_path / "photos")
    command = [sd, tmp_path / "store", "--from-images", folder, "--shard-size", 3]
    build(*command)
    whole, good = read_folder(tmp_path / "store"), (folder / "tall.png").read_bytes()
    (folder / "tall.png").write_bytes((folder / "wide.png").read_bytes())  # the winner of the second pair
    with pytest.raises(SystemExit, match=r"shard-00000.safetensors was made from other images of the pairs \['1'\] than are there now: put those back"):
        build(*command)
    assert read_folder(tmp_path / "store") == whole
    os.remove(shard_path(tmp_path / "store", 0))
    build(*command)
    assert read_folder(tmp_path / "store").keys() == whole.keys() and read_folder(tmp_path / "store") != whole
    os.remove(shard_path(tmp_path / "store", 0))
    (folder / "tall.png").write_bytes(good)
    build(*command)
    assert read_folder(tmp_path / "store") == whole


def test_every_kind_of_image_becomes_rgb_as_it_is_seen(tmp_path):
    ramp = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    grey = ramp[..., None].repeat(3, 2)
    alpha = np.full((4, 4, 1), 255, np.uint8)
    alpha[0] = 0
    on_white = np.where(alpha == 0, 255, grey)
    index = Image.fromarray(ramp // 17, "P") if hasattr(Image, "nothing") else Image.fromarray(ramp // 17).convert("P")
    index.putpalette(sum(([17 * i] * 3 for i in range(16)), []))
    for name, image, expected, how in (
            ("grey.png", Image.fromarray(ramp), grey, {}), ("deep.png", Image.fromarray(ramp.astype(np.uint16) * 257), grey, {}),
            ("deep.tif", Image.fromarray(ramp.astype(np.uint16) * 257), grey, {}), ("deep.pgm", Image.fromarray(ramp.astype(np.int32) * 257), grey, {}),
            ("clear.png", Image.fromarray(np.concatenate([grey, alpha], 2)), on_white, {}), ("clear.tif", Image.fromarray(np.concatenate([ramp[..., None], alpha], 2), "LA"), on_white, {}),
            ("colour.png", Image.fromarray(grey), np.where(grey == 34, 255, grey), dict(transparency=(34, 34, 34))),
            ("index.png", index, np.where(grey == 34, 255, grey), dict(transparency=2)), ("bits.png", Image.fromarray(ramp > 99), (grey > 99) * 255, {}),
            ("ink.tif", Image.fromarray(grey).convert("CMYK"), grey, {})):
        image.save(tmp_path / name, **how)
        found = open_rgb(tmp_path / name)
        assert found.mode == "RGB" and (np.array(found) == expected).all(), name
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "bright.png")  # 40000 / 65535 of 255
    assert (np.array(open_rgb(tmp_path / "bright.png")) == 156).all()
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "grey.tif")  # white may be 255, or more
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(ramp.astype(np.int32) * 9999999).save(tmp_path / "long.tif")
    Image.new("RGBA", (4, 4), (9, 9, 9, 0)).save(tmp_path / "nothing.png")
    for name, message in (("float.tif", "numbers of kind F without a known white"), ("long.tif", "of kind I without"), ("grey.tif", "of kind I without"), ("nothing.png", "wholly transparent")):
        with pytest.raises(ValueError, match=message):
            open_rgb(tmp_path / name)


def test_images_that_differ_only_where_nothing_is_seen_make_no_pair(tmp_path):
    rgba = np.full((8, 8, 4), 9, np.uint8)
    rgba[0, :, 3], rgba[1:, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "w.png")
    rgba[0, :, :3] = 200
    Image.fromarray(rgba).save(tmp_path / "l.png")
    row = dict(id="4", winner=str(tmp_path / "w.png"), loser=str(tmp_path / "l.png"))
    with pytest.raises(UserError, match=r"^pair 4: \S*w.png and \S*l.png are the same image$"):
        read_pair(row)
    rgba[0, :, 3] = 128
    Image.fromarray(rgba).save(tmp_path / "l.png")
    assert read_pair(row)[1].getpixel((0, 0)) == (227, 227, 227)


@pytest.mark.parametrize("column, cell", [("label_0", "1"), ("label_0", 0.7), ("label_0", -1.0), ("caption", 3)])
def test_a_label_or_caption_of_another_kind_is_named(column, cell, tmp_path):
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"label_0": [1.0], "caption": ["a fox"]} | {column: [cell]}), path)
    with pytest.raises(UserError, match="a.parquet:1: label_0 must be 0, 0.5 or 1, not" if column == "label_0" else "a.parquet:1: not a row with texts c, winner, loser: {'c': 3"):
        read_image_pairs(path)


def test_a_bad_row_of_several_files_is_named_by_its_number_in_all(tmp_path):
    for name, caption in (("a", "a fox"), ("b", 3)):
        pyarrow.parquet.write_table(pyarrow.table(dict(label_0=[1.0, 0.0], caption=[caption] * 2)), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=f"^{tmp_path}:3: not a row with texts c, winner, loser: {{'c': 3.*\n{tmp_path}:4: .*\n2 bad lines in {tmp_path} to be"):
        read_image_pairs(str(tmp_path))


def test_null_and_nan_are_no_labels(tmp_path, capsys):
    pyarrow.parquet.write_table(pyarrow.table(dict(label_0=[1.0, None, float("nan"), 0.5, 0.0], caption=["a fox"] * 5)), tmp_path / "a.parquet")
    assert [row["id"] for row in read_image_pairs(str(tmp_path / "a.parquet"))] == ["000001", "000005"]
    assert capsys.readouterr().out == "left out 2 of 5 pairs: without a label, a caption or a second image\nleft out 1 of 5 pairs: ties\n"


def pick_a_pic(path, rows, group=2):
    """Writes a .parquet file of (jpg_0, jpg_1, label_0, caption), with a column that nobody reads."""
    cells = zip(*rows, strict=True)
    columns = dict(zip(("jpg_0", "jpg_1", "label_0", "caption"), cells)) | dict(user_id=range(len(rows)))
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group, write_batch_size=10)  # rows in a page


def test_pick_a_pics_files_give_the_pairs_that_their_images_would_without_ties(sd, photos, tmp_path, capsys):
    folder, given = tmp_path / "data", [json.loads(line) for line in open(photos[0] / "metadata.jsonl")]
    jpgs = [[(photos[0] / row[side]).read_bytes() for side in ("winner", "loser")] for row in given]
    os.mkdir(folder)
    pick_a_pic(folder / "train-00000-of-00002.parquet", [
        (*jpgs[0], 1.0, "a fox"), (*jpgs[1], 0.5, "a tie"), (*jpgs[1][::-1], 0.0, "a fox"), (*jpgs[2], 1.0, " "), (*jpgs[2], 1.0, "a fox")])
    pick_a_pic(folder / "train-00001-of-00002.parquet", [(*jpgs[3], None, "no label"), (*jpgs[3], 1.0, "a fox"), (*jpgs[0], 0.5, "a tie")])
    pick_a_pic(folder / "test-00000-of-00001.parquet", [(*jpgs[0], 1.0, "of the test split")])
    build(sd, tmp_path / "files", "--from-images", photos[0], "--shard-size", 3)
    capsys.readouterr()
    build(sd, tmp_path / "store", "--from-images", folder, "--shard-size", 3)
    said = capsys.readouterr().out
    assert "left out 2 of 8 pairs: ties\n" in said and "left out 2 of 8 pairs: without a label, a caption or a second image\n" in said
    assert f"4 pairs in 2 shards\nnext: python train.py --model {sd} --pairs {tmp_path / 'store'} --objective diffusion-dpo\n" in said
    ours, theirs = PairStore(tmp_path / "store"), PairStore(tmp_path / "files")
    assert [row["id"] for row in ours.rows] == ["000001", "000003", "000005", "000007"]
    assert ours.rows[1]["winner"] == f"{folder}/train-00000-of-00002.parquet/1/0/jpg_1" and {row["c"] for row in ours.rows} == {"a fox"}
    for i in range(4):
        assert (ours[i][1] == theirs[i][1]).all() and (ours[i][2] == theirs[i][2]).all()
    os.remove(shard_path(tmp_path / "store", 0))
    whole = read_folder(tmp_path / "store")
    build(sd, tmp_path / "store", "--from-images", folder, "--shard-size", 3)  # reads the second shard, then the first
    assert whole.items() < read_folder(tmp_path / "store").items()
    build(sd, tmp_path / "one", "--from-images", folder / "test-00000-of-00001.parquet")
    assert PairStore(tmp_path / "one").rows[0]["c"] == "of the test split"


def png(*colour):
    image = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(image, "png")
    return image.getvalue()


PNG = png(9, 9, 9)


@pytest.mark.parametrize("rows, message", [
    ([(PNG, PNG, 1.0, "a fox")], "pair 000001: .*jpg_0 and .*jpg_1 are the same image\n1 bad pair: "),
    ([(b"x", b"x", 1.0, "a fox")], "pair 000001: .*a.parquet/0/0/jpg_0 cannot be read \\(it is no image, or of a kind that Pillow does not know\\)"),
    ([(b"x", b"y", 1.0, "a fox")], r"a.parquet/0/0/jpg_0 cannot be read"), ([(PNG, None, 1.0, "a fox")], "pair 000001: .*a.parquet/0/0/jpg_1 cannot be read \\(it is no image"),
    ([(b"x", b"y", 0.5, "a fox")], "a.parquet has no pairs in it"), (None, "a.parquet cannot be read .*label_0 does not exist"),
    (b"text", "a.parquet cannot be read .*: it must be a whole .parquet file")])
def test_what_pick_a_pics_files_cannot_give_is_named(rows, message, sd, tmp_path):
    if isinstance(rows, bytes):
        (tmp_path / "a.parquet").write_bytes(rows)
    elif rows is None:
        pyarrow.parquet.write_table(pyarrow.table(dict(caption=["a fox"])), tmp_path / "a.parquet")
    else:
        pick_a_pic(tmp_path / "a.parquet", rows)
    with pytest.raises(SystemExit, match=message):
        build(sd, tmp_path / "store", "--from-images", tmp_path / "a.parquet")


def test_an_image_of_a_row_group_is_found_in_any_order(tmp_path):
    path, cells = str(tmp_path / "a.parquet"), [bytes([i]) * 9 for i in range(40)]
    pick_a_pic(path, [(*cells[i:i + 2], 1.0, "a fox") for i in range(0, 40, 2)], group=7)
    for i in [*range(40), 3, 39, 0]:
        assert image_bytes(f"{path}/{i // 14}/{i // 2 % 7}/jpg_{i % 2}") == cells[i]


@pytest.mark.parametrize("flag, row, message", [
    ("--prompts", dict(c="same", c_minus="same"), "2: c is empty, or the same as c_minus: they make no preference"),
    ("--prompts", dict(c="", c_minus="b"), "2: c is empty"), ("--prompts", dict(c="x"), "2: not a row with texts c, c_minus"),
    ("--prompts", None, "has no pairs in it"), ("--from-images", None, "has no pairs in it"),
    ("--from-images", GOOD | dict(loser="none.png"), "pair 1: .*none.png cannot be read .*No such file or directory.*\n1 bad pair: "),
    ("--from-images", GOOD | dict(winner="deep"), "pair 1: .*deep cannot be read .*Is a directory"),
    ("--from-images", GOOD | dict(c=" "), "2: c is empty"), ("--from-images", GOOD | dict(loser=GOOD["winner"]), "pair 1: .*plain.png and .* are the same image"),
    ("--from-images", GOOD | dict(loser="deep/../plain.png"), "pair 1: .*plain.png and .* are the same image"),
    ("--from-images", GOOD | dict(loser="copy.png"), "pair 1: .*plain.png and .* are the same image"), ("--from-images", GOOD | dict(id="0"), "2: the id 0 is already that of"),
    ("--from-images", dict(c="a fox", winner="plain.png"), "2: not a row with texts c, winner, loser")])
def test_a_bad_line_is_named_and_nothing_is_begun(flag, row, message, sd, photos, tmp_path):
    shutil.copy(photos[0] / "plain.png", photos[0] / "copy.png")
    rows = [GOOD | dict(id="0", c_minus="b"), row, GOOD | dict(id="2", c_minus="b")] if row else []
    with pytest.raises(SystemExit, match=message if message.startswith("pair") else f"bad.jsonl[: ]{message}"):
        build(sd, tmp_path / "store", flag, write_lines(photos[0] / "bad.jsonl", rows))
    assert not os.path.exists(tmp_path / "store")


@pytest.mark.parametrize("flags, message", [
    (["--prompts", "none.jsonl"], "none.jsonl: there is no such .jsonl file. Make it with  python perturb.py"),
    (["--prompts", __file__], "test_build_pairs.py: there is no such .jsonl file"),
    (["--batch-size", "0"], "--batch-size: must be 1 or more, not 0"), (["--shard-size", "0"], "--shard-size: must be 1 or more"),
    (["--steps", "0"], "--steps: must be 1 or more"), (["--seed", "-1"], "--seed: must be 0 or more"),
    (["--guidance", "nan"], "--guidance: must be 0 or more, not nan"), (["--guidance", "1e9"], "--guidance: must be 100 or less, not 1e9"), (["--out", __file__], "cannot be a folder, because a file is in its place"),
    *[(["--from-images", path], rf"--from-images {path}\S*: must be a folder with a metadata.jsonl or with Pick-a-Pic's .parquet files, or one such file")
      for path in (os.path.dirname(__file__), __file__, "none.jsonl")],
    (["--from-images", ".", "--compile"], "--compile goes with pairs that are generated, not with --from-images"),
    *[(["--from-images", ".", flag, value], f"{flag} goes with pairs that are generated, not with --from-images")
      for flag, value in (("--prompts", "1"), ("--steps", "1"), ("--guidance", "1"), ("--seed", "1"), ("--negatives", "none"))]])
def test_mistakes_end_in_one_sentence(flags, message, sd, prompts, capsys):
    with pytest.raises(SystemExit) as stop:
        build_pairs.main(["--model", sd, *(["--prompts", prompts] if "--out" in flags else []), *flags])
    assert re.search(message, f"{stop.value} {capsys.readouterr().err}")


def test_inspect_says_and_draws_what_is_in_a_store(sd, pairs, tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "draw_grid", lambda _, columns, path: drawn.update({path: columns}))
    build_pairs.main(["--inspect", pairs + "/"])
    said, store = capsys.readouterr().out, PairStore(pairs)
    rows = store.rows
    assert '"steps": 2' in said and "checksums" not in said and said.endswith(f"{pairs}/ is whole\n")
    (path, ((_, winners, c), (_, losers, c_minus))), = drawn.items()
    assert path == pairs + ".png" and c == [rows[i]["c"] for i in (0, 2, 4, 6)] and c_minus == [rows[i]["c_minus"] for i in (0, 2, 4, 6)]
    model = models.load(sd)
    for images, side in ((winners, 1), (losers, 2)):
        latents = torch.stack([store[i][side] for i in (0, 2, 4, 6)]) / model.pipe.vae.config.scaling_factor
        with torch.no_grad():
            expected = (model.pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        ours = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(ours, expected, rtol=0, atol=0.01)
    monkeypatch.chdir(pairs)  # from any folder
    build_pairs.main(["--inspect", "."])
    assert list(drawn) == [pairs + ".png"]
    for arguments in (["--inspect", pairs, "--seed", "3"], []):
        with pytest.raises(SystemExit, match="give --model, or --inspect STORE and nothing else"):
            build_pairs.main(arguments)


def test_a_store_names_its_models_folder_from_anywhere(sd, tmp_path, monkeypatch):
    prompts = write_lines(tmp_path / "p.jsonl", [dict(id="1", c="a red fox", c_minus="fox")])
    monkeypatch.chdir(os.path.dirname(sd))
    build(os.path.basename(sd), tmp_path / "store", "--prompts", prompts, "--steps", 1)
    assert PairStore(str(tmp_path / "store")).meta["model"] == os.path.abspath(sd)


def test_inspect_tries_its_pictures_path_before_the_computing(copy, monkeypatch):
    os.mkdir(f"{copy}.png")
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(SystemExit, match=f"^'{copy}.png' must be the name of a picture to write, a file that ends in .png"):
        build_pairs.main(["--inspect", str(copy)])


def test_inspect_overwrites_its_own_picture_only(copy):
    assert problems_of(copy) == problems_of(copy) == []
    Image.new("RGB", (8, 8), "red").save(f"{copy}.png")
    before = open(f"{copy}.png", "rb").read()
    with pytest.raises(SystemExit, match=f"^{copy}.png exists, and this program did not write it: give another name.$"):
        build_pairs.main(["--inspect", str(copy)])
    assert open(f"{copy}.png", "rb").read() == before


@pytest.mark.slow
def test_a_compiled_network_makes_the_same_pairs(sd, prompts, pairs, tmp_path, monkeypatch):
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compile_(net, backend="aot_eager"))
    build(sd, tmp_path / "store", "--prompts", prompts, "--compile", *STEPS)
    for i, (_, *pair) in enumerate(PairStore(tmp_path / "store")[i] for i in range(10)):
        for x, y in zip(pair, PairStore(pairs)[i][1:]):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
