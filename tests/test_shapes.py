"""shapes.py and its studies: the training from scratch, and the experiment in small."""

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
from lib.files import json_lines
from lib.pairs import PairStore
from studies import shapes_full as full
from studies import shapes_reference

# ---- the training of the reference


def test_training_captions_are_wrong_and_dropped_in_the_stated_shares(monkeypatch):
    said = []
    monkeypatch.setattr(world, "write_caption", lambda rng, prompt: said.append(prompt) or "words")
    images, captions = shapes_reference.make_dataset(0, 1200)
    assert 0.07 < np.mean([caption == "" for caption in captions]) < 0.13
    kept = [image for image, caption in zip(images, captions) if caption]
    right = np.mean([world.judge_image(image.permute(1, 2, 0).numpy(), prompt)["correct"] for image, prompt in zip(kept, said, strict=True)])
    assert 0.46 < right < 0.54


def test_the_tokenizer_has_a_token_for_each_word():
    tokenizer = models.load("shapes").pipe.tokenizer
    for caption, words in (("a red square", 3), ("there is a circle to the left of a big triangle", 11)):
        assert len(tokenizer(caption).input_ids) == words + 2
    assert tokenizer("red circle").input_ids != tokenizer("blue circle").input_ids


def test_a_training_that_was_stopped_continues_exactly(tmp_path):
    def train(name, ends, updates_of_each_go):
        torch.manual_seed(0)
        net, x = torch.nn.Linear(3, 1), torch.arange(30.0).view(10, 3) / 30

        def loss(rng):
            if loss.left == 0:
                raise KeyboardInterrupt
            loss.left -= 1
            i = torch.randint(10, (4,), generator=rng)
            return (net(x[i]) - torch.randn(4, 1, generator=rng)).square().mean()

        for loss.left in updates_of_each_go:
            try:
                average = shapes_reference.fit(net, loss, ends, 1e-2, str(tmp_path / name), every=10)
            except KeyboardInterrupt:
                torch.nn.init.zeros_(net.weight)  # a new process would not have the weights either
        return average.weight.detach()

    straight = train("straight", [50], [-1])
    assert (train("stopped", [50], [23, 20, -1]) == straight).all()
    longer = train("longer", [50, 70], [-1])
    assert (train("stopped too", [50, 70], [30, 25, -1]) == longer).all()
    assert (train("70 at once", [70], [-1]) != longer).any()


def test_the_rate_falls_to_0_at_each_end(tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    net = torch.nn.Linear(3, 1)
    shapes_reference.fit(net, lambda rng: net(torch.ones(2, 3)).sum(), [400, 1000], 1.0, str(tmp_path / "state"))
    assert rates[0] == 1 / 200 and rates[199] == rates[300] == 1 and rates[350] == 0.5 and rates[399] == 0.01
    assert rates[400] == rates[750] == 1 and rates[875] == 0.5 and rates[999] == 1 / 250 and len(rates) == 1000


# ---- the model in weights/shapes


def test_the_shipped_reference_has_its_score_on_a_hundred_fixed_prompts_to_within_rounding():
    model, prompts = models.load("shapes"), world.make_prompts([1, 4], 100)
    x_T = torch.stack([models.initial_noise(i, model.latent_shape) for i in range(100)])
    images = models.sample(model, [p["caption"] for p in prompts], x_T, 25, 4, output_type="pil")
    right = [world.judge_image(image, p)["correct"] for image, p in zip(images, prompts, strict=True)]
    assert np.mean(right) == pytest.approx(0.75, abs=0.02)  # rounding may turn an image or two


def test_a_cell_of_the_table_is_the_same_by_the_commands_of_evaluate(tmp_path, monkeypatch):
    """The benchmark of evaluate.py has the prompts of seed 0: its images, kept as files, are judged by a second program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "PROMPTS", 400)
    every = shapes.scored_prompts(0)
    assert [row["prompt"] for row in judge.items("unused")] == [p["caption"] for p in every]
    monkeypatch.setattr(shapes, "scored_prompts", lambda seed: every[:20])
    monkeypatch.setitem(evaluate.BENCHMARKS, "shapes", (20, lambda data: judge.items(data)[:20], {"shapes": (None, judge.load, "rules")}))
    evaluate.main("generate --model shapes --bench shapes --guidance 3 --seed 0 --out run --batch-size 20".split())
    evaluate.main(["score", "run"])
    judged = [row["correct"] for _, row in json_lines("run/scores/shapes.jsonl")]
    scored = shapes.score_model("scores.json", "shapes", 0, 3)["correct"]
    assert judged == scored and 4 <= sum(scored) <= 16


# ---- the experiment in small, with a model that has hardly been trained


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a reference of two updates."""
    folder = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(IMAGES=64, AUTOENCODER_UPDATES=2).items():
            patch.setattr(shapes_reference, name, value)
        patch.chdir(folder)
        shapes_reference.main(["weights/", "--updates", "2"])
    return str(folder / "weights")


@pytest.fixture
def small(tmp_path, monkeypatch, reference):
    """An empty folder to work in, with `reference` for the shipped one and all numbers small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.PRESETS, "shapes", reference)
    for name, value in dict(STEPS=2, UPDATES=1, PROMPTS=20, PAIRS=6).items():
        monkeypatch.setattr(shapes, name, value)
    for name, value in dict(FULL_PAIRS=9, SEEDS=(0, 1), FEW_PAIRS=(4, 9)).items():
        monkeypatch.setattr(full, name, value)
    return tmp_path


def test_the_reference_is_written_in_half_precision_with_its_making(reference):
    with open(os.path.join(reference, "training.json"), encoding="utf-8") as file:
        training = json.load(file)
    assert training == dict(seed=0, images=64, autoencoder_updates=2, updates=[2], torch=torch.__version__)
    assert {x.dtype for x in load_file(os.path.join(reference, "unet", "diffusion_pytorch_model.safetensors")).values()} == {torch.float16}
    model = models.load(reference)
    assert model.latent_shape == (4, 8, 8) and model.net.dtype == torch.float32
    assert os.listdir(os.path.dirname(reference)) == ["weights"]


def test_a_folder_that_is_not_a_reference_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("mine")
    for path in ("mine/letter.txt", "letter.txt"):
        with open(path, "w") as file:
            file.write("dear")
    for folder in ("mine", "mine/"):
        with pytest.raises(SystemExit, match="mine/? holds other files and no training.json: move it away, or give another name"):
            shapes_reference.main([folder])
    with pytest.raises(SystemExit, match="letter.txt cannot be a folder, because a file is in its place"):
        shapes_reference.main(["letter.txt"])
    with open("mine/training.json", "w") as file:
        json.dump(dict(model="sd14"), file)  # a result of train.py
    with pytest.raises(SystemExit, match="mine was begun with other seed than now: use the same again, or another folder"):
        shapes_reference.main(["mine"])
    assert sorted(os.listdir()) == ["letter.txt", "mine"] and sorted(os.listdir("mine")) == ["letter.txt", "training.json"]


def test_the_shipped_reference_and_a_training_of_another_length_are_not_overwritten(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_reference, "IMAGES", 64)
    monkeypatch.setattr(shapes_reference, "AUTOENCODER_UPDATES", 2)
    with pytest.raises(SystemExit, match=r"was begun with updates \[2\], not \[2, 3\]"):
        shapes_reference.main([reference, "--updates", "3", "2"])
    with pytest.raises(SystemExit, match="shapes was begun with images 131072, not 64"):
        shapes_reference.main([models.PRESETS["shapes"]])


def test_a_reference_that_is_made_again_leaves_its_users_files(reference, monkeypatch):
    monkeypatch.chdir(os.path.dirname(reference))
    with open("weights/card.md", "w") as file:
        file.write("mine")
    weights = load_file("weights/unet/diffusion_pytorch_model.safetensors")
    for name, value in dict(IMAGES=64, AUTOENCODER_UPDATES=2).items():
        monkeypatch.setattr(shapes_reference, name, value)
    os.remove("weights/unet/diffusion_pytorch_model.safetensors")
    shapes_reference.main(["weights", "--updates", "2"])
    again = load_file("weights/unet/diffusion_pytorch_model.safetensors")
    assert all((weights[name] == again[name]).all() for name in weights)
    with open("weights/card.md") as file:
        assert file.read() == "mine"
    os.remove("weights/card.md")


def test_a_command_is_printed_as_a_shell_would_read_it(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(shapes.train, "main", given.extend)
    shapes.command(shapes.train, "--out", "runs/16 pairs, losers of other noise", "--beta", 1000)
    assert capsys.readouterr().out.splitlines()[1] == "$ python train.py --out 'runs/16 pairs, losers of other noise' --beta 1000"
    assert given == ["--out", "runs/16 pairs, losers of other noise", "--beta", "1000"]


def test_the_prompts_of_the_readme_are_those_that_shapes_py_makes_its_pairs_of():
    with open("examples/prompts.txt", encoding="utf-8") as file:
        assert file.read().splitlines() == [p["caption"] for p in world.make_prompts([shapes.SEED, 1], shapes.PAIRS)]


@pytest.mark.slow
def test_the_experiment_runs_and_goes_on_where_it_was_stopped(small, capsys):
    shapes.main([])
    out = capsys.readouterr().out
    for command in ("perturb.py", "build_pairs.py --model shapes", "train.py --model shapes", "--objective diffusion-dpo",
                    "--objective distill"):
        assert "$ python " in out and command in out
    table = out[out.index("| model |"):]
    assert all(f"| {name} |" in table for name in ("Reference", "D-DPO", "DDSPO", "Distilled")) and "Not-paired" not in table
    home = small / "runs" / "shapes"
    assert (home / "shapes.png").stat().st_size > 10_000 and (home / "table.md").read_text() + "\n" == table
    kept = {path: path.stat().st_mtime_ns for path in home.rglob("*")
            if path.suffix == ".pt" or path.name.startswith("shard") or "guidance" in path.name}
    assert len(kept) == 1 + 3 + 8  # a shard, three checkpoints, four models' scores at two guidances
    shutil.rmtree(home / "DDSPO")  # as if stopped while this was in the making
    for path in home.glob("DDSPO-*"):
        path.unlink()
    shapes.main([])
    again = capsys.readouterr().out
    assert again[again.index("| model |"):] == table
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if "DDSPO" not in str(path))


def test_a_folder_that_was_begun_with_another_reference_is_refused(small):
    (small / "runs" / "shapes").mkdir(parents=True)
    (small / "runs" / "shapes" / "settings.json").write_text(json.dumps(dict(reference="another")))
    with pytest.raises(SystemExit, match="was begun with reference another"):
        shapes.main([])


def test_variants_hold_the_pairs_that_their_names_say(small, monkeypatch):
    monkeypatch.setattr(full, "FULL_PAIRS", 32)
    monkeypatch.setattr(full, "FEW_PAIRS", (4, 16, 32))
    rows = shapes.perturbed("home", 0, 32)
    whole = PairStore(shapes.make_store("home", rows, 0))
    found = {name: PairStore(store) for name, store in full.variants("home", 0).items()}
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
    least, more, most = ([full.kept_share(row) for row in third.rows] for third in thirds)
    assert [len(least), len(more), len(most)] == [11, 11, 10] and least[0] > most[-1]
    assert min(least) >= max(more) >= min(more) >= max(most)
    row, x_0_w, x_0_l = thirds[0][0]
    same = next(i for i in range(32) if whole.rows[i]["id"] == row["id"])
    assert (x_0_w == whole[same][1]).all() and (x_0_l == whole[same][2]).all() and row["c"] == rows[same]["c"]
    for share, (low, high) in {"20%": (0.05, 0.35), "55%": (0.4, 0.7)}.items():
        removed = [1 - len(row["c_minus"].split()) / len(row["c"].split()) for row in found[f"{share} removed"].rows]
        assert len(removed) == 8 and low < np.mean(removed) < high
    assert [row["c_minus"] for row in found["100% removed"].rows] == [""] * 8


def test_the_full_experiment_compares_every_method_control_length_and_variant_on_every_seed(small, monkeypatch):
    """With the pair stores as they are, but without training: a drawn score for each place where one would be kept."""
    tuned = set()

    def tune(home, method, flags, store, seed, updates=None):
        assert os.path.exists(store) and f"seed-{seed}" in store
        assert flags[-4:] == ["--beta", 1000, "--lr", 3e-5] or method in ("Distilled", "Distilled, no prompt", "Rand-positive", "Not-paired")
        tuned.add((os.path.relpath(store, f"runs/shapes-full/seed-{seed}"), os.path.relpath(home, f"runs/shapes-full/seed-{seed}"), method, updates, seed))
        os.makedirs(os.path.join(home, method), exist_ok=True)
        if not os.path.exists(os.path.join(home, method, "pipeline")):
            os.symlink(models.PRESETS["shapes"], os.path.join(home, method, "pipeline"))
        with open(os.path.join(home, method, "log.jsonl"), "w") as file:
            for n in range((updates or 1) + 1):
                file.write(json.dumps(dict(update=n, winner=n, drift=2 * n)) + "\n")
        return os.path.join(home, method, "pipeline")

    asked = {}

    def score_model(path, folder, seed, guidance, negatives=None):
        assert f"seed-{seed}" in path and (folder == "shapes" or folder.startswith(os.path.dirname(path)))
        if negatives:
            asked[path] = negatives
        return dict(correct=(np.random.default_rng(list(path.encode())).random(20) < 0.5).tolist(), frechet=1.0)

    monkeypatch.setattr(full, "tune", tune)
    monkeypatch.setattr(full, "score_model", score_model)
    monkeypatch.setattr(shapes, "score_model", score_model)
    full.main([])
    home = small / "runs" / "shapes-full"
    text = {path.stem: path.read_text() for path in home.glob("*.md")}
    assert text.keys() == {"methods", "controls", "length", "variants"}

    def share(place, g, seeds=(0, 1)):
        return np.mean([score_model(f"runs/shapes-full/seed-{seed}/{place}-guidance{g}.json", "shapes", seed, g)["correct"] for seed in seeds])

    def table(text, first):
        lines = text[text.index(f"| {first} |"):].split("\n\n")[0].strip().split("\n")
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "| --- |" not in line]

    # what was tuned, on which pairs
    variants = ["20% removed", "55% removed", "100% removed", "4 pairs", "4 pairs, losers of other noise", "9 pairs, losers of other noise",
                "c_minus lost least", "c_minus lost more", "c_minus lost most"]
    for seed in (0, 1):
        expected = {("pairs without c_minus" if "no prompt" in method else "pairs", ".", method, None, seed) for method in full.METHODS}
        expected |= {("pairs", "length", method, updates, seed) for method in ("D-DPO", "DDSPO") for updates in full.LENGTHS}
        expected |= {(f"variants/{name}/pairs", f"variants/{name}", method, None, seed) for name in variants for method in ("D-DPO", "DDSPO")}
        assert {row for row in tuned if row[-1] == seed} == expected
    rows = PairStore("runs/shapes-full/seed-1/pairs without c_minus").rows
    assert {row["c_minus"] for row in rows} == {""} and len(rows) == 9

    # methods
    for g in (1, 3, 5):
        rows = [row for row in table(text["methods"].split("| model |", 1 + (3, 1, 5).index(g))[-1].join(["| model |", ""]), "model")]
        assert [row[0] for row in rows[1:]] == ["Reference", *full.METHODS]
        for name, guidance, right, *differences, _ in rows[1:]:
            assert guidance == str(g) and right.startswith(f"{share(name, g):.3f} [")
            for other, difference in zip(("Reference", "D-DPO", "Distilled"), differences, strict=True):
                assert difference == "" if name in ("Reference", other) else difference.startswith(f"{share(name, g) - share(other, g):+.3f} [")
    best = table(text["methods"], "at its best guidance")
    for name, guidance, right, *_ in best[1:]:
        assert float(guidance) == full.BEST_GUIDANCE[name] and right.startswith(f"{share(name, int(guidance)):.3f} [")
    assert [row[0] for row in best[1:]] == list(full.BEST_GUIDANCE)

    # the reference with c_minus as negative prompt
    rows, every = table(text["controls"], "c_minus has lost"), {}
    for name, *cells in rows[1:]:
        low, high = full.SHARES[name]
        for g, cell in zip(full.NEGATIVE_SCALES, cells, strict=True):
            every[name, g] = share(f"negative prompt/{low:g}-{high:g}", f"{g:g}", [100])
            assert cell == f"{every[name, g]:.3f}"
            lost = [1 - len(c_minus.split()) / len(p["caption"].split()) for c_minus, p in
                    zip(asked[f"runs/shapes-full/seed-100/negative prompt/{low:g}-{high:g}-guidance{g:g}.json"], shapes.scored_prompts(100), strict=True)]
            assert low - 0.1 < np.mean(lost) < high + 0.1
    name, g = max(every, key=every.get)
    found = share("negative prompt/{:g}-{:g}".format(*full.SHARES[name]), f"{g:g}")
    assert f"The best of these, {name} and scale {g:g}, on the three other seeds: {found:.3f} [" in text["controls"]

    # lengths
    rows = table(text["length"], "method")
    assert [row[:2] for row in rows[1:]] == [[method, str(n)] for method in ("D-DPO", "DDSPO") for n in full.LENGTHS]
    for method, n, at_1, _, at_3, _, winner, drift in rows[1:]:
        assert at_1.startswith(f"{share(f'length/{method}, {n} updates', 1):.3f} [") and at_3.startswith(f"{share(f'length/{method}, {n} updates', 3):.3f} [")
        last = range(int(n) - 9, int(n) + 1)  # the run's last ten updates up to this one
        assert (winner, drift) == (f"{np.mean(last):.2g}", f"{2 * np.mean(last):.2g}")

    # variants
    places = {"9 pairs": ""} | {name: f"variants/{name}/" for name in variants}
    rows = table(text["variants"], "pairs")
    assert rows[0] == ["pairs", "D-DPO, guidance 1", "DDSPO", "DDSPO minus D-DPO", "D-DPO, guidance 3", "DDSPO", "DDSPO minus D-DPO"]
    assert [row[0] for row in rows[1:]] == list(places)
    for name, *cells in rows[1:]:
        for k, g in enumerate((1, 3)):
            d_dpo, ddspo = (share(places[name] + method, g) for method in ("D-DPO", "DDSPO"))
            assert cells[3 * k:3 * k + 2] == [f"{d_dpo:.3f}", f"{ddspo:.3f}"] and cells[3 * k + 2].startswith(f"{ddspo - d_dpo:+.3f} [")
    assert {path.name for path in (small / "figures").iterdir()} == {"shapes.png", "shapes-front.png", "shapes-length.png"}


def test_the_negative_prompt_reaches_the_sampler_and_is_nothing_where_it_is_empty(small):
    """End to end: c_minus by perturb.py's rule, images by the pipeline, verdicts and distance."""
    reference = shapes.score_model("plain.json", "shapes", 0, 3)
    empty = shapes.score_model("empty.json", "shapes", 0, 3, negatives=[""] * 20)
    assert empty == reference and len(empty["correct"]) == 20
    home = small / "home"
    for share in ("25 %", "75 %"):
        found = full.negative_prompt(str(home), 0, share, 3)
        assert found["frechet"] != reference["frechet"]
    assert sorted(os.listdir(home / "negative prompt")) == ["0.25-0.25-guidance3.json", "0.75-0.75-guidance3.json"]
    assert full.negative_prompt(str(home), 0, "25 %", 3) != full.negative_prompt(str(home), 0, "75 %", 3)


def test_settings_are_searched_by_the_share_at_guidance_3_in_per_cent_and_then_at_1(small, monkeypatch):
    monkeypatch.setattr(full, "GRID", {"--beta": (1, 2), "--scale": (4,)})
    monkeypatch.setattr(full, "RATES", (3,))
    monkeypatch.setattr(full, "METHODS", {name: full.METHODS[name] for name in ("DDSPO", "Not-paired", "Distilled")})
    shares = {"1-3/DDSPO": {1: 0.5, 3: 0.604}, "2-3/DDSPO": {1: 0.6, 3: 0.596}, "4-3/Distilled": {1: 0.1, 3: 0.2}}
    flags = {}
    monkeypatch.setattr(full, "tune", lambda place, method, its, store, seed: flags.setdefault(f"{os.path.basename(place)}/{method}", its) and place)
    monkeypatch.setattr(full, "scores_at", lambda place, name, folder, seed, guidances: {
        g: dict(correct=[shares.get(f"{os.path.basename(place)}/{name}", {}).get(g, g / 10)], frechet=g) for g in guidances})
    text = full.search_settings("home")
    assert flags == {"1-3/DDSPO": ["--beta", 1, "--lr", 3], "2-3/DDSPO": ["--beta", 2, "--lr", 3],
                     "4-3/Distilled": ["--objective", "distill", "--scale", 4, "--lr", 3]}
    assert "| DDSPO | 1 | 3 | 0.500, 1.00 | 0.604, 3.00 |" in text and "| DDSPO, 2-3 | 0.600 |" in text and "| DDSPO, 1-3 |" not in text


def test_the_share_of_content_words_that_a_prompt_keeps():
    row = dict(c="there is a big red circle above a blue square", c_minus="is big red circle a square")
    assert full.kept_share(row) == 4 / 6


def test_tables_show_means_and_paired_differences(monkeypatch):
    monkeypatch.setattr(shapes, "PROMPTS", 20)
    rng, runs = np.random.default_rng(0), {}
    for seed in (0, 1):
        runs[seed] = {name: {g: dict(correct=(rng.random(20) < share).tolist(), frechet=1.0 + seed) for g in (1, 3)}
                      for name, share in (("Reference", 0.3), ("D-DPO", 0.5), ("DDSPO", 0.7))}
    share = {(name, g): np.mean([runs[seed][name][g]["correct"] for seed in runs]) for name in runs[0] for g in (1, 3)}
    lines = shapes.table_of_models(runs, "model", {"Reference": 3, "D-DPO": 3, "DDSPO": 1}).split("\n")
    rows = {line.split(" | ")[0]: [cell.strip(" |") for cell in line.split(" | ")] for line in lines}
    assert float(rows["| DDSPO"][2].split()[0]) == pytest.approx(share["DDSPO", 1], abs=6e-4)
    assert float(rows["| DDSPO"][3].split()[0]) == pytest.approx(share["DDSPO", 1] - share["Reference", 3], abs=6e-4)
    assert float(rows["| DDSPO"][4].split()[0]) == pytest.approx(share["DDSPO", 1] - share["D-DPO", 3], abs=6e-4)
    assert rows["| Reference"][3] == rows["| D-DPO"][4] == "" and rows["| DDSPO"][1] == "1" and rows["| DDSPO"][5] == "1.50"
    tags = shapes.table_by_tag(runs, 3).split("\n")
    prompts = [p for seed in runs for p in shapes.scored_prompts(seed)]
    values = np.concatenate([runs[seed]["DDSPO"][3]["correct"] for seed in runs])
    position = [v for v, p in zip(values, prompts) if p["tag"] == "position" and not p["held_out"]]
    held_out = [v for v, p in zip(values, prompts) if p["held_out"]]
    cells = [cell.strip() for cell in tags[4].strip("|").split("|")]
    assert cells[0] == "DDSPO" and (cells[4], cells[6]) == (f"{np.mean(position):.2f}", f"{np.mean(held_out):.2f}")
