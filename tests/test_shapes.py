"""shapes.py: the world against its scorer, and the experiment in small."""

import shutil

import numpy as np
import pytest
import torch

import shapes


def worlds(count, seed=0, held_out=False):
    rng = np.random.default_rng(seed)
    for i in range(count):
        prompt = shapes.make_prompt(rng, shapes.TAGS[i % 5] if not held_out else ("colors", "color attribution")[i % 2], held_out)
        yield rng, prompt, shapes.fill(rng, prompt)


def test_the_scorer_is_right_on_true_images_and_says_no_to_wrong_captions():
    right, wrong, tags = 0, 0, []
    for rng, prompt, scene in worlds(1500):
        found = shapes.find_objects(shapes.render(scene))
        right += shapes.verdict(found, prompt)["correct"]
        wrong += shapes.verdict(found, shapes.corrupt(rng, prompt))["correct"]
        tags.append(prompt["tag"])
    assert right >= 0.995 * 1500 and wrong <= 0.005 * 1500
    assert all(tags.count(tag) == 300 for tag in shapes.TAGS)


def test_found_objects_are_those_that_were_drawn():
    for _, _, scene in worlds(200, seed=1):
        found = sorted(shapes.find_objects(shapes.render(scene)))
        for (shape, color, x, y, _), object_ in zip(sorted(scene), found, strict=True):
            assert object_[:2] == (shape, color)
            assert abs(object_[2] - x) < 1.6 and abs(object_[3] - y) < 1.6


def test_noise_on_the_pixels_does_not_disturb_the_scorer():
    right = 0
    for rng, prompt, scene in worlds(300, seed=2):
        noisy = shapes.render(scene) + rng.normal(0, 12, (32, 32, 3))
        right += shapes.verdict(shapes.find_objects(noisy.clip(0, 255).astype(np.uint8)), prompt)["correct"]
    assert right >= 0.98 * 300


def test_held_out_combinations_are_never_in_training_and_always_in_their_prompts():
    rng = np.random.default_rng(3)
    for tag in shapes.TAGS * 100:
        prompt = shapes.make_prompt(rng, tag)
        scene = shapes.fill(rng, prompt)
        assert not {(shape, color) for shape, color, *_ in scene} & shapes.HELD_OUT
        assert not set(prompt["objects"]) & shapes.HELD_OUT
    for _, prompt, _ in worlds(100, seed=4, held_out=True):
        assert set(prompt["objects"]) & shapes.HELD_OUT


@pytest.mark.parametrize("objects, relation, correct, reason", [
    ([("circle", "red"), ("square", None)], "left of", True, ""),
    ([("square", "blue"), ("circle", "red")], "right of", True, ""),
    ([("circle", "red"), ("square", None)], "right of", False, "colour or relation"),
    ([("circle", "red"), ("square", None)], "above", False, "colour or relation"),
    ([("circle", "blue"), ("square", "red")], None, False, "colour or relation"),
    ([("circle", "red"), ("triangle", None)], None, False, "shape"),
    ([("circle", "red")], None, False, "2 objects, not 1"),
])
def test_verdicts_by_hand(objects, relation, correct, reason):
    scene = [("circle", "red", 8, 16, 5), ("square", "blue", 22, 17, 5)]
    found = shapes.find_objects(shapes.render(scene))
    result = shapes.verdict(found, dict(objects=objects, relation=relation))
    assert (result["correct"], result["reason"]) == (correct, reason)


@pytest.mark.parametrize("relation, dx, dy", [("left of", -9, 3), ("right of", 9, -3), ("above", 2, -8), ("below", -2, 8)])
def test_relations_point_the_way_they_say(relation, dx, dy):
    assert [r for r in shapes.RELATIONS if shapes.related(dx, dy, r)] == [relation]


def test_a_corrupted_prompt_differs_in_one_thing():
    for rng, prompt, _ in worlds(300, seed=5):
        wrong = shapes.corrupt(rng, prompt)
        changes = [a != b for o, p in zip(prompt["objects"], wrong["objects"]) for a, b in zip(o, p)]
        assert sum(changes) + (prompt["relation"] != wrong["relation"]) == 1


def test_captions_say_what_the_prompt_asks_for():
    for rng, prompt, _ in worlds(200, seed=6):
        words = shapes.write_caption(rng, prompt).split()
        for shape, color in prompt["objects"]:
            assert shape in words and (color is None or words[words.index(color) + 1] in shapes.SHAPES)
        assert prompt["relation"] is None or prompt["relation"].split()[0] in words
        assert len(words) <= 13  # with both end tokens this fits the tokenizer's 16


def test_intervals_cover_the_mean_and_pairing_narrows_them():
    rng = np.random.default_rng(0)
    a = rng.random((3, 400)) < 0.5
    b = a.copy()
    b[:, :20] = True  # better on a few prompts only
    mean, low, high = shapes.interval(a, rng)
    assert mean == a.mean() and low < mean < high
    assert (high - low) == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(1200), rel=0.1)
    _, low_of_difference, high_of_difference = shapes.interval(b.astype(float) - a, rng)
    assert high_of_difference - low_of_difference < 0.5 * (high - low) and low_of_difference > 0


def test_training_captions_are_wrong_and_dropped_in_the_stated_shares():
    images, captions = shapes.make_dataset(0, 1200)
    dropped = np.mean([caption == "" for caption in captions])
    assert 0.07 < dropped < 0.13
    colors = {color: [c for c in captions if color in c.split()] for color in shapes.COLORS}
    right = np.mean([color in [o[1] for o in shapes.find_objects(image)] for color in colors
                     for image, caption in zip(images, captions) if caption in colors[color]])
    assert 0.6 < right < 0.9  # half of the captions have one thing wrong, which is a colour in some


def test_the_tokenizer_has_a_token_for_each_word():
    tokenizer = shapes.make_tokenizer(["a red circle to the left of a blue square", "there is a triangle"])
    for caption, words in (("a red square", 3), ("there is a circle to the left of a triangle", 10)):
        assert len(tokenizer(caption).input_ids) == words + 2
    assert tokenizer("red circle").input_ids != tokenizer("blue circle").input_ids


def test_a_training_that_was_stopped_continues_exactly(tmp_path):
    def train(name, updates_of_each_go):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1)
        x = torch.arange(30.0).view(10, 3) / 30

        def loss(i, rng):
            if loss.left == 0:
                raise KeyboardInterrupt
            loss.left -= 1
            return (net(x[i]) - torch.randn(len(i), 1) - torch.randn(len(i), 1, generator=rng)).square().mean()

        for loss.left in updates_of_each_go:
            try:
                shapes.fit([net], loss, 10, 250, 4, 1e-2, 0, name, str(tmp_path / name))
            except KeyboardInterrupt:
                torch.manual_seed(1)
        return net.weight.detach(), torch.rand(1)

    straight, stopped = train("straight", [-1]), train("stopped", [130, 120, -1])
    assert (straight[0] == stopped[0]).all() and straight[1] == stopped[1]


@pytest.mark.slow
def test_the_whole_experiment_runs_and_continues_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "QUICK", dict(autoencoder=3, reference=3, images=64, pairs=6, updates=4, prompts=20))
    shapes.main(["--quick"])
    out = capsys.readouterr().out
    for script in ("perturb.py", "build_pairs.py --model", "train.py --model", "--objective diffusion-dpo", "--negatives not-paired",
                   "evaluate.py grid --models"):
        assert "$ python " in out and script in out
    first = out[out.index("| guidance 1 |"):]
    assert all(f"| {name} |" in first for name in ("Reference", "D-DPO", "DDSPO", "Rand-positive", "Not-paired"))
    assert "python shapes.py" in first
    home = tmp_path / "runs" / "shapes-quick-0"
    assert (home / "shapes.png").stat().st_size > 10_000 and (home / "shapes-curves.png").stat().st_size > 5_000
    kept = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.suffix in (".safetensors", ".pt", ".json")}
    shutil.rmtree(home / "Not-paired")  # as if stopped while this was in the making
    for path in home.glob("Not-paired-*"):
        path.unlink()
    shapes.main(["--quick"])
    again = capsys.readouterr().out
    assert again[again.index("| guidance 1 |"):] == first
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if "Not-paired" not in str(path))


def test_flags_that_cannot_apply_are_refused():
    for flags in (["--grid", "--quick"], ["--grid", "--seeds", "3"]):
        with pytest.raises(SystemExit, match="give neither --quick nor --seeds"):
            shapes.main(flags)
    with pytest.raises(SystemExit, match="--seeds must be 1 or more"):
        shapes.main(["--seeds", "0"])
