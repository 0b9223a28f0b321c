"""shapes.py: the world against its scorer, and the distance between image sets against a second computation."""

import numpy as np
import pytest

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


def test_the_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40000, 3))
    assert shapes.frechet(x, x) == pytest.approx(0, abs=1e-9)
    shifted = x + [1, 2, 0]
    assert shapes.frechet(x, shifted) == pytest.approx(5, rel=1e-6)
    wide = rng.normal(size=(40000, 3)) * [1, 3, 0.5]  # commuting covariances: sum of (s - r)^2
    assert shapes.frechet(x, wide) == pytest.approx(0 + 4 + 0.25, rel=0.05)
