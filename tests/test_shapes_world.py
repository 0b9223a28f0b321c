"""lib/shapes_world.py and judges/shapes.py: the world against its score, and the captions against what they are made from."""

import json

import numpy as np
import pytest
from PIL import Image

import perturb
from judges import shapes
from lib import shapes_world as world
from lib.files import UserError


def worlds(count, seed=0, held_out=False):
    """(rng, prompt, scene) of count prompts, the tags in turn."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        prompt = world.make_prompt(rng, world.TAGS[i % len(world.TAGS)], held_out)
        yield rng, prompt, world.make_scene(rng, prompt)


def test_the_score_is_right_on_true_images_and_says_no_to_wrong_captions():
    right, wrong = 0, 0
    for rng, prompt, scene in [*worlds(1500), *worlds(500, seed=1, held_out=True)]:
        image = world.render(scene)
        right += world.judge_image(image, prompt)["correct"]
        wrong += world.judge_image(image, world.corrupt(rng, prompt))["correct"]
    assert right >= 0.995 * 2000 and wrong <= 0.005 * 2000


def test_found_objects_are_those_that_were_drawn():
    for _, _, scene in worlds(200, seed=1):
        found = sorted(world.find_objects(world.render(scene)))
        for (shape, color, x, y, radius), object_ in zip(sorted(scene), found, strict=True):
            assert object_[:2] == (shape, color)
            assert abs(object_[2] - x) < 1.6 and abs(object_[3] - y) < 1.6 and abs(object_[4] - radius) < 1.1


def test_noise_on_the_pixels_does_not_disturb_the_score():
    right = 0
    for rng, prompt, scene in worlds(300, seed=2):
        noisy = world.render(scene) + rng.normal(0, 12, (32, 32, 3))
        right += world.judge_image(noisy.clip(0, 255).astype(np.uint8), prompt)["correct"]
    assert right >= 0.98 * 300


def test_held_out_combinations_are_never_in_training_and_always_in_their_prompts():
    for rng, prompt, scene in worlds(500, seed=3):
        assert not {(shape, color) for shape, color, *_ in scene} & world.HELD_OUT
        assert not {o[:2] for o in world.corrupt(rng, prompt)["objects"]} & world.HELD_OUT
    for _, prompt, _ in worlds(100, seed=4, held_out=True):
        assert {o[:2] for o in prompt["objects"]} & world.HELD_OUT


SCENE = [("circle", "red", 8, 16, 4), ("square", "blue", 22, 17, 6)]


@pytest.mark.parametrize("objects, where, reason", [
    ([("circle", "red", "small"), ("square", "blue", "large")], "left", ""),
    ([("square", "blue", None), ("circle", "red", None)], "right", ""),
    ([("square", "blue", None), ("circle", "red", None)], None, ""),
    ([("circle", "red", None), ("square", "blue", None)], "right", "place"),
    ([("circle", "red", None), ("square", "blue", None)], "up", "place"),
    ([("circle", "red", "large"), ("square", "blue", "large")], "left", "sizes"),
    ([("circle", "blue", None), ("square", "red", None)], None, "colors"),
    ([("circle", "red", None), ("triangle", "blue", None)], None, "shapes"),
    ([("circle", "red", None)], None, "number"),
])
def test_verdicts_by_hand(objects, where, reason):
    assert world.judge_image(world.render(SCENE), dict(objects=objects, where=where)) == dict(correct=not reason, reason=reason)


@pytest.mark.parametrize("x, y, where", [(8, 16, "left"), (24, 14, "right"), (14, 7, "up"), (17, 24, "down"), (16, 15, "middle")])
def test_one_object_lies_in_one_place_of_the_image(x, y, where):
    image = world.render([("circle", "red", x, y, 4)])
    right = [w for w in (*world.DIRECTIONS, "middle")
             if world.judge_image(image, dict(objects=[("circle", "red", None)], where=w))["correct"]]
    assert right == [where]


@pytest.mark.parametrize("where, dx, dy", [("left", -9, 3), ("right", 9, -3), ("up", 2, -8), ("down", -2, 8)])
def test_directions_point_the_way_they_say(where, dx, dy):
    assert [w for w in world.DIRECTIONS if world.lies(dx, dy, w)] == [where]


def test_a_corrupted_prompt_differs_in_one_thing():
    for rng, prompt, _ in worlds(300, seed=5):
        wrong = world.corrupt(rng, prompt)
        changes = [a != b for o, p in zip(prompt["objects"], wrong["objects"], strict=True) for a, b in zip(o, p, strict=True)]
        assert sum(changes) + (prompt["where"] != wrong["where"]) == 1


def test_captions_say_what_the_prompt_asks_for_and_no_more():
    """The prompt is read back from its caption, by other means than it was written."""
    words_for = {"left": "left", "right": "right", "top": "up", "above": "up", "over": "up", "bottom": "down", "below": "down",
                 "under": "down", "middle": "middle", "center": "middle"}
    for rng, prompt, _ in worlds(400, seed=6):
        words = world.write_caption(rng, prompt).split()
        objects = []
        for i, word in enumerate(words):
            if word in world.SHAPES:
                size = {"little": "small", "small": "small", "big": "large", "large": "large"}.get(words[i - 2])
                objects.append((word, words[i - 1], size))
        assert objects == prompt["objects"]
        assert [words_for[word] for word in words if word in words_for] == [prompt["where"]] * (prompt["where"] is not None)
        content = [word for word in words if word in world.CONTENT]
        assert len(content) == sum(len([x for x in o if x]) for o in objects) + (prompt["where"] is not None)
        assert 3 <= len(content) <= 8 and len(words) <= 16  # with both end tokens this fits the tokenizer's 18


def test_prompts_are_all_different_with_the_tags_in_turn_and_the_stated_share_held_out():
    prompts = world.make_prompts([0, 9], 1000, held_out_share=0.25)
    assert len({p["caption"] for p in prompts}) == 1000
    assert [p["tag"] for p in prompts[:10]] == [*world.TAGS, *world.TAGS]
    assert sum(p["held_out"] for p in prompts) == 250 and all(p["held_out"] for p in prompts[750:])
    assert prompts == world.make_prompts([0, 9], 1000, held_out_share=0.25)


def test_random_removal_seldom_leaves_all_that_is_asked_for_and_seldom_nothing():
    shares = []
    for p in world.make_prompts([0, 1], 1024):
        c, c_minus = ([word for word in text.split() if word in world.CONTENT]
                      for text in (p["caption"], perturb.remove_words(p["caption"], 0)))
        shares.append(len(c_minus) / len(c))
    assert np.mean(np.array(shares) == 1) < 0.02 and np.mean(np.array(shares) == 0) < 0.1


def test_the_benchmark_judges_its_own_images_after_a_round_through_json():
    rows = shapes.items("unused")
    assert len(rows) == 400 and len({row["path"] for row in rows}) == 400
    assert {(row["group"], row["index"]) for row in rows} == {(tag, i) for tag in world.TAGS for i in range(80)}
    rows = json.loads(json.dumps(rows))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(world.render(world.make_scene(rng, row["metadata"]))) for row in rows]
    found = shapes.load("cpu", "unused")(rows, images)
    assert sum(verdict["correct"] for verdict in found) >= 398
    shuffled = shapes.load("cpu", "unused")(rows, images[1:] + images[:1])
    assert sum(verdict["correct"] for verdict in shuffled) <= 4
    with pytest.raises(UserError, match=r"shapes benchmark needs images of 32 x 32 pixels, not \(64, 64\)"):
        shapes.load("cpu", "unused")(rows[:1], [Image.new("RGB", (64, 64))])
