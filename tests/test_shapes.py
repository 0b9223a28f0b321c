"""shapes.py and shapes_reference.py: the training from scratch, and the experiment in small."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import shapes
from judges import shapes as judge
from lib import models
from lib import shapes_world as world
from lib.files import read_lines
from lib.pairs import PairStore
from studies import shapes_reference

# ---- the training of the reference


def test_training_captions_are_wrong_and_dropped_in_the_stated_shares(monkeypatch):
    said = []
    monkeypatch.setattr(world, "write_caption", lambda rng, prompt: said.append(prompt) or "words")
    images, captions = shapes_reference.make_dataset(0, 1200)
    assert 0.07 < np.mean([caption == "" for caption in captions]) < 0.13
    kept = [image for image, caption in zip(images, captions) if caption]
    right = np.mean([world.verdict(world.find_objects(image), prompt)["correct"] for image, prompt in zip(kept, said, strict=True)])
    assert 0.46 < right < 0.54


def test_the_tokenizer_has_a_token_for_each_word():
    tokenizer = shapes_reference.make_tokenizer(["a red circle to the left of a big blue square", "there is a triangle"])
    for caption, words in (("a red square", 3), ("there is a circle to the left of a big triangle", 11)):
        assert len(tokenizer(caption).input_ids) == words + 2
    assert tokenizer("red circle").input_ids != tokenizer("blue circle").input_ids


def test_a_training_that_was_stopped_continues_exactly(tmp_path):
    def train(name, updates_of_each_go, ends=(50,)):
        torch.manual_seed(0)
        net, x = torch.nn.Linear(3, 1), torch.arange(30.0).view(10, 3) / 30

        def loss(batch, rng):
            if loss.left == 0:
                raise KeyboardInterrupt
            loss.left -= 1
            i = torch.randint(10, (batch,), generator=rng)
            return (net(x[i]) - torch.randn(batch, 1, generator=rng)).square().mean()

        for updates in ends:
            for loss.left in updates_of_each_go:
                try:
                    average, state = shapes_reference.fit(net, loss, updates, 4, 1e-2, str(tmp_path / name), every=10)
                except KeyboardInterrupt:
                    torch.nn.init.zeros_(net.weight)  # a new process would not have the weights either
        assert state["ends"] == list(ends)
        return average.weight.detach()

    straight, stopped = train("straight", [-1]), train("stopped", [23, 20, -1])
    assert (straight == stopped).all()
    longer = train("longer", [-1], (50, 70))
    assert (train("stopped too", [30, -1], (50, 70)) == longer).all() and not (longer == straight).all()


# ---- the model in weights/shapes


def test_the_shipped_reference_has_its_score_on_a_hundred_fixed_prompts_to_within_rounding():
    model, prompts = models.load("shapes"), world.make_prompts([1, 4], 100)
    x_T = torch.stack([models.initial_noise(i, model.latent_shape) for i in range(100)])
    images = models.sample(model, [p["caption"] for p in prompts], x_T, 25, 4, output_type="pil")
    right = [world.verdict(world.find_objects(np.array(image)), p)["correct"] for image, p in zip(images, prompts, strict=True)]
    assert np.mean(right) == pytest.approx(0.75, abs=0.02)  # rounding may turn an image or two


def test_a_cell_of_the_table_is_the_same_by_the_commands_of_evaluate(tmp_path, monkeypatch):
    """The benchmark of evaluate.py has the prompts of seed 0: its images, kept as files, are judged by a second program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "PROMPTS", 400)
    every = shapes.scored_prompts(0)
    assert [row["prompt"] for row in judge.items("unused")] == [p["caption"] for p in every]
    monkeypatch.setattr(shapes, "scored_prompts", lambda seed: every[:20])
    monkeypatch.setitem(evaluate.BENCHMARKS, "shapes", (20, lambda data: judge.items(data)[:20], {"shapes": (None, judge.load)}))
    evaluate.main("generate --model shapes --bench shapes --guidance 3 --seed 0 --out run --batch-size 20".split())
    evaluate.main(["score", "run"])
    judged = [row["correct"] for row in read_lines("run/scores/shapes.jsonl")]
    scored = shapes.score("scores.json", "shapes", 0, 3)["correct"]
    assert judged == scored and 4 <= sum(scored) <= 16


# ---- the experiment in small, with a model that has hardly been trained


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a reference of two updates."""
    folder = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(IMAGES=64, AUTOENCODER_UPDATES=2, VALIDATION_PROMPTS=2).items():
            patch.setattr(shapes_reference, name, value)
        shapes_reference.make_reference(str(folder / "weights"), 2, str(folder / "home"))
    return str(folder / "weights")


@pytest.fixture
def small(tmp_path, monkeypatch, reference):
    """An empty folder to work in, with `reference` for the shipped one and all numbers small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.PRESETS, "shapes", reference)
    small = dict(REFERENCE=reference, STEPS=2, UPDATES_OF_TUNING=1, PROMPTS=20, QUICK_PAIRS=6, FULL_PAIRS=9, SEEDS=(0,))
    for name, value in small.items():
        monkeypatch.setattr(shapes, name, value)
    return tmp_path


def test_the_reference_is_written_in_half_precision_with_its_making(reference):
    with open(os.path.join(reference, "training.json"), encoding="utf-8") as file:
        training = json.load(file)
    assert training["commands"] == ["python shapes.py --reference --updates 2"] and training["images"] == 64
    assert {x.dtype for x in load_file(os.path.join(reference, "unet", "diffusion_pytorch_model.safetensors")).values()} == {torch.float16}
    model = models.load(reference)
    assert model.latent_shape == (4, 8, 8) and model.net.dtype == torch.float32


def test_a_command_is_printed_as_a_shell_would_read_it(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(shapes.train, "main", given.extend)
    shapes.command(shapes.train, "--out", "runs/16 pairs, losers of other noise", "--beta", 1000)
    assert capsys.readouterr().out.splitlines()[1] == "$ python train.py --out 'runs/16 pairs, losers of other noise' --beta 1000"
    assert given == ["--out", "runs/16 pairs, losers of other noise", "--beta", "1000"]


def test_the_prompts_of_the_readme_are_those_that_shapes_py_makes_its_pairs_of():
    with open("examples/prompts.txt", encoding="utf-8") as file:
        assert file.read().splitlines() == [p["caption"] for p in world.make_prompts([shapes.SEEDS[0], 1], shapes.QUICK_PAIRS)]


@pytest.mark.slow
def test_the_experiment_runs_and_goes_on_where_it_was_stopped(small, capsys):
    shapes.main([])
    out = capsys.readouterr().out
    for command in ("perturb.py", "build_pairs.py --model shapes", "train.py --model shapes", "--objective diffusion-dpo"):
        assert "$ python " in out and command in out
    table = out[out.index("| guidance 1 |"):]
    assert all(f"| {name} |" in table for name in ("Reference", "D-DPO", "DDSPO")) and "Not-paired" not in table
    home = small / "runs" / "shapes"
    assert (home / "shapes.png").stat().st_size > 10_000 and (home / "table.md").read_text() == table
    kept = {path: path.stat().st_mtime_ns for path in home.rglob("*")
            if path.suffix == ".pt" or path.name.startswith("shard") or "guidance" in path.name}
    assert len(kept) == 1 + 2 + 6  # a shard, two checkpoints, three models' scores at two guidances
    shutil.rmtree(home / "seed-0" / "DDSPO")  # as if stopped while this was in the making
    for path in (home / "seed-0").glob("DDSPO-*"):
        path.unlink()
    shapes.main([])
    again = capsys.readouterr().out
    assert again[again.index("| guidance 1 |"):] == table
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if "DDSPO" not in str(path))


def test_a_folder_that_was_begun_with_another_reference_is_refused(small):
    (small / "runs" / "shapes").mkdir(parents=True)
    (small / "runs" / "shapes" / "settings.json").write_text(json.dumps(dict(reference="another")))
    with pytest.raises(SystemExit, match="was begun with reference another"):
        shapes.main([])


def test_variants_hold_the_pairs_that_their_names_say(small, monkeypatch):
    monkeypatch.setattr(shapes, "FULL_PAIRS", 32)
    monkeypatch.setattr(shapes, "PAIRS", (4, 16, 32))
    rows = shapes.perturbed("home", 0, 32)
    whole = PairStore(shapes.make_pairs("home", rows, 0))
    found = {name: PairStore(store) for name, store in shapes.variants("home", 0).items()}
    noise = PairStore("home/variants/other noise/pairs")
    assert [row["c_minus"] for row in noise.rows] == [row["c_minus"] for row in whole.rows]
    assert not (noise[0][1] == whole[0][1]).all()
    for n in (4, 16):
        few, mixed = found[f"{n} pairs"], found[f"{n} pairs, losers of other noise"]
        assert len(few) == len(mixed) == n
        for i in range(n):
            (row, x_0_w, x_0_l), (_, mixed_w, mixed_l) = few[i], mixed[i]  # their checksums are compared, too
            assert (row["c"], row["c_minus"]) == (rows[i]["c"], rows[i]["c_minus"])
            assert (x_0_w == whole[i][1]).all() and (x_0_l == whole[i][2]).all()
            assert (mixed_w == whole[i][1]).all() and (mixed_l == noise[i][2]).all() and not (mixed_l == x_0_l).all()
    assert len(found["32 pairs, losers of other noise"]) == 32
    thirds = [found[f"c_minus lost {which}"] for which in ("least", "more", "most")]
    least, more, most = ([shapes.kept_share(row) for row in third.rows] for third in thirds)
    assert [len(least), len(more), len(most)] == [11, 11, 10] and least[0] > most[-1]
    assert min(least) >= max(more) >= min(more) >= max(most)
    row, x_0_w, x_0_l = thirds[0][0]
    same = next(i for i in range(32) if whole.rows[i]["id"] == row["id"])
    assert (x_0_w == whole[same][1]).all() and (x_0_l == whole[same][2]).all() and row["c"] == rows[same]["c"]
    for share, (low, high) in {"20%": (0.05, 0.35), "55%": (0.4, 0.7)}.items():
        removed = [1 - len(row["c_minus"].split()) / len(row["c"].split()) for row in found[f"{share} removed"].rows]
        assert len(removed) == 8 and low < np.mean(removed) < high
    assert [row["c_minus"] for row in found["100% removed"].rows] == [""] * 8


def test_the_full_experiment_compares_every_method_and_every_variant_on_every_seed(small, monkeypatch):
    """With the pair stores as they are, but without training: a drawn score for each place where one would be kept."""
    tuned = set()

    def train_method(home, method, pairs, seed):
        assert os.path.exists(pairs) and f"seed-{seed}" in pairs
        tuned.add((os.path.relpath(pairs, f"runs/shapes-full/seed-{seed}"), method, seed))
        os.makedirs(os.path.join(home, method))
        os.symlink(shapes.REFERENCE, os.path.join(home, method, "pipeline"))
        return os.path.join(home, method, "pipeline")

    def score(path, name, seed, guidance):
        assert f"seed-{seed}" in path and (name == "shapes" or os.path.dirname(os.path.dirname(name)) == os.path.dirname(path))
        return dict(correct=(np.random.default_rng(list(path.encode())).random(20) < 0.5).tolist(), frechet=1.0)

    for name, value in dict(SEEDS=(0, 1), PAIRS=(4, 9), train_method=train_method, score=score).items():
        monkeypatch.setattr(shapes, name, value)
    shapes.main(["--full"])
    text = (small / "runs" / "shapes-full" / "table.md").read_text()
    variants = ["9 pairs", "20% removed", "55% removed", "100% removed", "4 pairs", "4 pairs, losers of other noise",
                "9 pairs, losers of other noise", "c_minus lost least", "c_minus lost more", "c_minus lost most"]
    places = dict(zip(variants, ["", *[f"variants/{name}/" for name in variants[1:]]]))
    assert tuned == {(f"{places[name]}pairs", method, seed) for seed in (0, 1) for name in variants for method in
                     (("D-DPO", "DDSPO") if places[name] else shapes.METHODS)}

    def share(place, method, g):
        return np.mean([score(f"runs/shapes-full/seed-{seed}/{place}{method}-guidance{g}.json", "shapes", seed, g)["correct"] for seed in (0, 1)])

    rows = [[cell.strip() for cell in line.strip(" |").split(" | ")] for line in text.split("| pairs |")[1].strip().split("\n")[2:]]
    assert [row[0] for row in rows] == variants
    assert "\n| pairs | D-DPO, guidance 1 | DDSPO | DDSPO minus D-DPO | D-DPO, guidance 3 | DDSPO | DDSPO minus D-DPO |\n| --- | --- " in text
    for g in (1, 3, 5):
        assert f"\n| guidance {g} | {' | '.join(world.TAGS)} | held out |\n" in text
    for name, *cells in rows:
        for k, g in enumerate((1, 3)):
            d_dpo, ddspo = (share(places[name], method, g) for method in ("D-DPO", "DDSPO"))
            assert cells[3 * k:3 * k + 2] == [f"{d_dpo:.3f}", f"{ddspo:.3f}"] and cells[3 * k + 2].startswith(f"{ddspo - d_dpo:+.3f} [")
    for method, g in (("Reference", 1), ("Rand-positive", 3), ("Not-paired", 5)):
        assert f"\n| {method} | {share('', method, g):.3f} [" in text.split(f"| guidance {g} |")[1]
    for method, g in shapes.BEST_GUIDANCE.items():
        assert f"\n| {method} | {g} | {share('', method, g):.3f} [" in text
    assert {path.name for path in (small / "figures").iterdir()} == {"shapes.png", "shapes-front.png", "shapes-pairs.png"}


def test_the_share_of_content_words_that_a_prompt_keeps():
    row = dict(c="there is a big red circle above a blue square", c_minus="is big red circle a square")
    assert shapes.kept_share(row) == 4 / 6


def test_tables_show_means_and_paired_differences(monkeypatch):
    monkeypatch.setattr(shapes, "PROMPTS", 20)
    rng, runs = np.random.default_rng(0), {}
    for seed in (0, 1):
        runs[seed] = {name: {g: dict(correct=(rng.random(20) < share).tolist(), frechet=1.0 + seed) for g in (1, 3)}
                      for name, share in (("Reference", 0.3), ("D-DPO", 0.5), ("DDSPO", 0.7))}
    rows = {line.split(" | ")[0]: [cell.strip(" |") for cell in line.split(" | ")]
            for line in shapes.table(runs, (3,)).split("\n")[:5]}
    share = {name: np.mean([runs[seed][name][3]["correct"] for seed in runs]) for name in runs[0]}
    assert float(rows["| DDSPO"][1].split()[0]) == pytest.approx(share["DDSPO"], abs=6e-4)
    assert float(rows["| DDSPO"][2].split()[0]) == pytest.approx(share["DDSPO"] - share["Reference"], abs=6e-4)
    assert float(rows["| DDSPO"][3].split()[0]) == pytest.approx(share["DDSPO"] - share["D-DPO"], abs=6e-4)
    assert rows["| Reference"][2] == rows["| D-DPO"][3] == "" and rows["| DDSPO"][4] == "1.50"
    monkeypatch.setattr(shapes, "BEST_GUIDANCE", {"Reference": 3, "D-DPO": 3, "DDSPO": 1})
    best = shapes.table_at_best(runs).split("\n")[4].split(" | ")
    at_1 = np.mean([runs[seed]["DDSPO"][1]["correct"] for seed in runs])
    assert float(best[3].split()[0]) == pytest.approx(at_1 - share["Reference"], abs=6e-4)
