"""shapes.py and its studies: the training from scratch, and the experiment in small."""

import argparse
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

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

        def loss(net, rng, x):
            if loss.left == 0:
                raise KeyboardInterrupt
            loss.left -= 1
            i = torch.randint(10, (4,), generator=rng)
            return (net(x[i]) - torch.randn(4, 1, generator=rng)).square().mean()

        for loss.left in updates_of_each_go:
            try:
                average = shapes_reference.fit(net, loss, [x], ends, 1e-2, str(tmp_path / name), every=10)
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
    shapes_reference.fit(net, lambda net, rng: net(torch.ones(2, 3)).sum(), [], [400, 1000], 1.0, str(tmp_path / "state"))
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
    scored = shapes.score_model(".", "Reference", 0, 3)["correct"]
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


@pytest.mark.parametrize("name", ["vae.pt", "net.pt"])
def test_a_damaged_state_of_a_training_is_to_be_deleted(name, reference, tmp_path, monkeypatch):
    path = os.path.join(shutil.copytree(reference, tmp_path / "copy"), name)
    for key, value in dict(IMAGES=64, AUTOENCODER_UPDATES=2).items():
        monkeypatch.setattr(shapes_reference, key, value)
    for damage in (lambda: os.truncate(path, os.path.getsize(path) // 2), lambda: os.truncate(path, 0),
                   lambda: torch.save(argparse.Namespace(a=1), path), lambda: torch.save([1, [dict(a=torch.zeros(2))] * 3], path)):
        damage()
        with pytest.raises(SystemExit, match=rf"^{path} cannot be read \(.*\): delete it, and its training begins anew.\Z") as stop:
            shapes_reference.main([str(tmp_path / "copy"), "--updates", "2"])
        assert "trust" not in str(stop.value)  # as torch's own text says


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


def test_a_folder_that_was_begun_with_other_settings_or_another_reference_is_refused(small, reference, monkeypatch):
    store = shapes.make_store("home", shapes.perturbed("home", 0, 4), 0)
    other = shutil.copytree(reference, "other")
    weights = load_file(f"{other}/unet/diffusion_pytorch_model.safetensors")
    save_file({name: x + 1 for name, x in weights.items()}, f"{other}/unet/diffusion_pytorch_model.safetensors")
    monkeypatch.setitem(models.PRESETS, "shapes", other)
    with pytest.raises(SystemExit, match=f"{store} was begun with other weights than now"):
        shapes.make_store("home", shapes.perturbed("home", 0, 4), 0)
    (small / "runs" / "shapes").mkdir(parents=True)
    (small / "runs" / "shapes" / "settings.json").write_text(json.dumps(dict(shapes.METHODS, guidance=3, updates=7)))
    with pytest.raises(SystemExit, match="runs/shapes was begun with updates 7, not 1"):
        shapes.main([])
    assert not (small / "runs" / "shapes" / "prompts.txt").exists()


def test_variants_hold_the_pairs_that_their_names_say(small, monkeypatch):
    monkeypatch.setattr(full, "FULL_PAIRS", 32)
    monkeypatch.setattr(full, "FEW_PAIRS", (4, 16, 32))
    found = {name: PairStore(store) for name, store in full.other_stores("home", 0).items()}
    whole, noise = PairStore("home/pairs"), PairStore("home/other noise/pairs")
    rows = whole.rows
    assert len(whole) == 32 and found["32 pairs"].rows == rows
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
    words = lambda text: [word for word in text.split() if word in world.CONTENT]  # noqa: E731
    least, more, most = ([len(words(row["c_minus"])) / len(words(row["c"])) for row in third.rows] for third in thirds)
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

    def tune(home, name, flags, store, seed):
        assert home == f"runs/shapes-full/seed-{seed}" and os.path.exists(store) and store.startswith(home + "/")
        method = name if name in full.METHODS else name.split(", ")[0]
        assert {key: value for key, value in flags.items() if key != "--updates"} == full.METHODS[method]
        tuned.add((os.path.relpath(store, home), name, flags.get("--updates"), seed))
        os.makedirs(os.path.join(home, name), exist_ok=True)
        if not os.path.exists(os.path.join(home, name, "pipeline")):
            os.symlink(models.PRESETS["shapes"], os.path.join(home, name, "pipeline"))
        with open(os.path.join(home, name, "log.jsonl"), "w") as file:
            for n in range(flags.get("--updates", 1) + 1):
                file.write(json.dumps(dict(update=n, winner=n * (seed + 1), drift=2 * n)) + "\n")

    asked = {}

    def score_model(home, name, seed, guidance, negatives=None):
        assert home == f"runs/shapes-full/seed-{seed}"
        assert name.startswith("Reference") or (os.path.relpath(f"{home}/{name}/pipeline") and os.path.isdir(f"{home}/{name}/pipeline"))
        if negatives:
            asked[seed, name, guidance] = negatives
        rng = np.random.default_rng(list(f"{seed} {name} {guidance:g}".encode()))
        return dict(correct=(rng.random(20) < 0.5).tolist(), frechet=rng.random())

    monkeypatch.setattr(full, "tune", tune)
    monkeypatch.setattr(full, "score_model", score_model)
    monkeypatch.setattr(shapes, "score_model", score_model)
    full.main([])
    home = small / "runs" / "shapes-full"
    text = {path.stem: path.read_text() for path in home.glob("*.md")}
    assert text.keys() == {"methods", "controls", "length", "variants"}

    def drawn(name, g, what, seeds):
        return np.mean([score_model(f"runs/shapes-full/seed-{seed}", name, seed, g)[what] for seed in seeds])

    def share(name, g, seeds=(0, 1)):
        return drawn(name, g, "correct", seeds)

    def distance(name, g, seeds=(0, 1)):
        return f"{drawn(name, g, 'frechet', seeds):.2f}"

    def table(text, first):
        lines = text[text.index(f"| {first} |"):].split("\n\n")[0].strip().split("\n")
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "| --- |" not in line]

    # what was tuned, on which pairs
    variants = ["9 pairs", "20% removed", "55% removed", "100% removed", "4 pairs", "4 pairs, losers of other noise",
                "9 pairs, losers of other noise", "c_minus lost least", "c_minus lost more", "c_minus lost most"]
    for seed in (0, 1):
        expected = {("pairs without c_minus" if "Distilled, no" in method else "pairs", method, None, seed) for method in full.METHODS}
        expected |= {("pairs", f"{method}, {updates} updates", updates, seed) for method in ("D-DPO", "DDSPO") for updates in full.LENGTHS}
        expected |= {("pairs" if name == "9 pairs" else f"{name}/pairs", f"{method}, {name}", None, seed)
                     for name in variants for method in ("D-DPO", "DDSPO")}
        assert {row for row in tuned if row[-1] == seed} == expected
    rows = PairStore("runs/shapes-full/seed-1/pairs without c_minus").rows
    assert {row["c_minus"] for row in rows} == {""} and len(rows) == 9

    # methods
    for g in (1, 3, 5):
        rows = [row for row in table(text["methods"].split("| model |", 1 + (3, 1, 5).index(g))[-1].join(["| model |", ""]), "model")]
        assert [row[0] for row in rows[1:]] == ["Reference", *full.METHODS]
        for name, guidance, right, *differences, frechet in rows[1:]:
            assert guidance == str(g) and right.startswith(f"{share(name, g):.3f} [") and frechet == distance(name, g)
            for other, difference in zip(("Reference", "D-DPO", "Distilled"), differences, strict=True):
                assert difference == "" if name in ("Reference", other) else difference.startswith(f"{share(name, g) - share(other, g):+.3f} [")
    best = table(text["methods"], "at its best guidance")
    for name, guidance, right, *_ in best[1:]:
        assert float(guidance) == full.BEST_GUIDANCE[name] and right.startswith(f"{share(name, int(guidance)):.3f} [")
    assert [row[0] for row in best[1:]] == list(full.BEST_GUIDANCE)

    # the reference with c_minus as negative prompt
    rows, every = table(text["controls"], "c_minus has lost"), {}
    for name, *cells in rows[1:]:
        (low, high), whole = full.SHARES[name], f"Reference, c_minus without {name} as negative prompt"
        for g, cell in zip(full.NEGATIVE_SCALES, cells, strict=True):
            every[name, g] = share(whole, g, [100])
            assert cell == f"{every[name, g]:.3f}"
            lost = [1 - len(c_minus.split()) / len(p["caption"].split())
                    for c_minus, p in zip(asked[100, whole, g], shapes.scored_prompts(100), strict=True)]
            assert low - 0.1 < np.mean(lost) < high + 0.1
    name, g = max(every, key=every.get)
    best = f"Reference, c_minus without {name} as negative prompt"
    assert (f"The best of these, {name} and scale {g:g}, on the three other seeds: {share(best, g):.3f} [" in text["controls"]
            and text["controls"].endswith(f"Fréchet distance {distance(best, g)}\n"))
    assert {seed for seed, *which in asked if which == [best, g]} == {0, 1, 100}

    # lengths
    rows = table(text["length"], "method")
    assert [row[:2] for row in rows[1:]] == [[method, str(n)] for method in ("D-DPO", "DDSPO") for n in full.LENGTHS]
    for method, n, at_1, frechet_1, at_3, frechet_3, winner, drift in rows[1:]:
        name = f"{method}, {n} updates"
        assert at_1.startswith(f"{share(name, 1):.3f} [") and at_3.startswith(f"{share(name, 3):.3f} [")
        assert (frechet_1, frechet_3) == (distance(name, 1), distance(name, 3))
        last = np.arange(int(n) - 9, int(n) + 1)  # the run's last ten updates
        assert (winner, drift) == (f"{np.mean(1.5 * last):.2g}", f"{2 * np.mean(last):.2g}")

    # variants
    rows = table(text["variants"], "pairs")
    assert rows[0] == ["pairs", "D-DPO, guidance 1", "DDSPO", "DDSPO minus D-DPO", "D-DPO, guidance 3", "DDSPO", "DDSPO minus D-DPO"]
    assert [row[0] for row in rows[1:]] == variants
    for name, *cells in rows[1:]:
        for k, g in enumerate((1, 3)):
            d_dpo, ddspo = (share(f"{method}, {name}", g) for method in ("D-DPO", "DDSPO"))
            assert cells[3 * k:3 * k + 2] == [f"{d_dpo:.3f}", f"{ddspo:.3f}"] and cells[3 * k + 2].startswith(f"{ddspo - d_dpo:+.3f} [")
    assert {path.name for path in (small / "figures").iterdir()} == {"shapes.png", "shapes-front.png", "shapes-length.png"}


def test_the_negative_prompt_reaches_the_sampler_and_is_nothing_where_it_is_empty(small):
    """End to end: c_minus by perturb.py's rule, images by the pipeline, verdicts and distance."""
    home = str(small / "home")
    reference = shapes.score_model(home, "Reference", 0, 3)
    empty = shapes.score_model(home, "Reference again", 0, 3, negatives=[""] * 20)
    assert empty == reference and len(empty["correct"]) == 20
    names = [full.negative_prompt({0: home}, share, 3) for share in ("25 %", "75 %")]
    found = [shapes.scores({0: home}, name, 3, "frechet") for name in ("Reference", *names)]
    assert len({float(x[0]) for x in found}) == 3
    assert sorted(os.listdir(home)) == sorted(f"{name}-guidance3.json" for name in ("Reference", "Reference again", *names))


def test_settings_are_searched_by_the_share_at_guidance_3_in_per_cent_and_then_at_1(small, monkeypatch):
    monkeypatch.setattr(full, "GRID", {"--beta": (1, 2), "--scale": (4,)})
    monkeypatch.setattr(full, "RATES", (3,))
    monkeypatch.setattr(full, "METHODS", {name: full.METHODS[name] for name in ("DDSPO", "Not-paired", "Distilled")})
    shares = {"DDSPO, 1-3": {1: 0.5, 3: 0.604}, "DDSPO, 2-3": {1: 0.6, 3: 0.596}, "Distilled, 4-3": {1: 0.1, 3: 0.2}}
    flags = {}
    monkeypatch.setattr(full, "BEST_GUIDANCE", dict(Reference=3, DDSPO=3, Distilled=3))
    monkeypatch.setattr(full, "stores_of", lambda home, seed: dict.fromkeys(full.METHODS, home))
    monkeypatch.setattr(full, "tune", lambda home, name, its, store, seed: flags.setdefault(name, its))
    monkeypatch.setattr(shapes, "score_model", lambda home, name, seed, g: dict(correct=[shares.get(name, {}).get(g, g / 10)], frechet=g))
    text = full.settings({100: "home"})
    assert flags == {"DDSPO, 1-3": {"--beta": 1, "--lr": 3}, "DDSPO, 2-3": {"--beta": 2, "--lr": 3},
                     "Distilled, 4-3": {"--objective": "distill", "--scale": 4, "--lr": 3}}
    assert "| DDSPO | 1 | 3 | 0.500, 1.00 | 0.604, 3.00 |" in text and "| DDSPO, 2-3 | 0.600 |" in text and "| DDSPO, 1-3 |" not in text
    assert "| Reference | 0.100 |" in text


def test_tables_show_means_and_paired_differences(monkeypatch):
    monkeypatch.setattr(shapes, "PROMPTS", 20)
    rng, kept = np.random.default_rng(0), {}
    for name, share in (("Reference", 0.3), ("D-DPO", 0.5), ("DDSPO", 0.7), ("Distilled", 0.6)):
        for seed, g in itertools.product((0, 1), (1, 3)):
            kept[name, seed, g] = dict(correct=(rng.random(20) < share).tolist(), frechet=1.0 + seed)
    monkeypatch.setattr(shapes, "score_model", lambda home, name, seed, g: kept[name, seed, g])
    names, homes = ("Reference", "D-DPO", "DDSPO", "Distilled"), {0: "a", 1: "b"}
    share = {(name, g): np.mean([kept[name, seed, g]["correct"] for seed in homes]) for name in names for g in (1, 3)}
    lines = shapes.table_of_models(homes, "model", {"Reference": 3, "D-DPO": 3, "DDSPO": 1, "Distilled": 3}).split("\n")
    rows = {line.split(" | ")[0]: [cell.strip(" |") for cell in line.split(" | ")] for line in lines}
    assert float(rows["| DDSPO"][2].split()[0]) == pytest.approx(share["DDSPO", 1], abs=6e-4)
    assert float(rows["| DDSPO"][3].split()[0]) == pytest.approx(share["DDSPO", 1] - share["Reference", 3], abs=6e-4)
    assert float(rows["| DDSPO"][4].split()[0]) == pytest.approx(share["DDSPO", 1] - share["D-DPO", 3], abs=6e-4)
    assert rows["| Reference"][3] == rows["| D-DPO"][4] == "" and rows["| DDSPO"][1] == "1" and rows["| DDSPO"][6] == "1.50"
    both = shapes.tables_at(homes, names, 3).split("\n\n")
    assert both[0] + "\n" == shapes.table_of_models(homes, "model", dict.fromkeys(names, 3))
    tags = both[1].split("\n")
    prompts = [p for seed in homes for p in shapes.scored_prompts(seed)]
    values = np.concatenate([kept["DDSPO", seed, 3]["correct"] for seed in homes])
    position = [v for v, p in zip(values, prompts) if p["tag"] == "position" and not p["held_out"]]
    held_out = [v for v, p in zip(values, prompts) if p["held_out"]]
    cells = [cell.strip() for cell in tags[4].strip("|").split("|")]
    assert cells[0] == "DDSPO" and (cells[4], cells[6]) == (f"{np.mean(position):.2f}", f"{np.mean(held_out):.2f}")
