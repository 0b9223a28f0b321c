"""A world of coloured shapes: scenes, captions as people write them, and a score by rule, with no neural judge.

Images of 32 x 32 pixels show one or two objects. A prompt asks for shapes, colours, sizes and places: "a small red
circle to the left of a big blue square". The judge finds the objects of an image by their colour and outline, and
calls the image right if it shows what the prompt asks for and nothing else. studies/shapes_reference.py trains a model
of this world. The tags follow the example of GenEval's (arXiv 2310.11513).
"""

import itertools

import numpy as np
from scipy import ndimage

# ---- scenes: a list of objects (shape, colour, x, y, radius), in pixels

SIZE, BACKGROUND = 32, (235, 235, 235)
COLORS = {"red": (215, 40, 40), "green": (40, 165, 60), "blue": (50, 80, 220), "yellow": (240, 205, 30),
          "purple": (160, 50, 180), "black": (25, 25, 25)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": (3.5, 4.2), "large": (5.8, 6.6), None: (3.5, 6.6)}  # the radius that is drawn, from and to
LARGE = 4.8  # the judge calls an object of at least this radius large
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
NEAR = 3.0  # pixels from the centre, along x and along y, that count as the middle of the image
HELD_OUT = {("circle", "yellow"), ("square", "purple"), ("triangle", "blue")}  # in no training image or caption


def mask(shape, u, v):
    """Which points lie in a shape. u and v are coordinates in its bounding box [-1, 1]^2; v points down."""
    if shape == "circle":
        return u**2 + v**2 <= 1
    return (abs(v) <= 1) & (abs(u) <= (1 if shape == "square" else (v + 1) / 2))


def render(scene):
    """A scene -> (32, 32, 3) uint8."""
    image = np.full((SIZE, SIZE, 3), BACKGROUND, np.uint8)
    v, u = np.mgrid[:SIZE, :SIZE]
    for shape, color, x, y, radius in scene:
        image[mask(shape, (u - x) / radius, (v - y) / radius)] = COLORS[color]
    return image


def lies(dx, dy, where, near=NEAR, clearly=1.0):
    """Whether an offset in pixels points in a direction, `clearly` more along it than across ("middle": is small)."""
    if where == "middle":
        return max(abs(dx), abs(dy)) <= near
    right, down = DIRECTIONS[where]
    along, across = dx * right + dy * down, dx * down + dy * right
    return along > max(near, clearly * abs(across))


def offset(scene):
    """(dx, dy): where the first object is, seen from the second or, if there is one only, from the image's centre."""
    x, y = scene[1][2:4] if len(scene) == 2 else ((SIZE - 1) / 2, (SIZE - 1) / 2)
    return scene[0][2] - x, scene[0][3] - y


def make_scene(rng, prompt):
    """A scene that the prompt describes. Objects do not touch, and sizes and places are clear to the judge."""
    low, high = zip(*[SIZES[size] for *_, size in prompt["objects"]])
    where = prompt["where"]
    near = NEAR / 2 if where == "middle" else NEAR * 1.5
    while True:
        radius = rng.uniform(low, high)  # (objects,)
        x, y = rng.uniform(radius + 0.5, SIZE - 1.5 - radius, (2, len(radius)))
        scene = [(shape, color, *place) for (shape, color, _), place in zip(prompt["objects"], zip(x, y, radius))]
        dx, dy = offset(scene)
        apart = len(scene) == 1 or max(abs(dx), abs(dy)) >= radius.sum() + 2
        if apart and (where is None or lies(dx, dy, where, near, clearly=1.4)):
            return scene


# ---- prompts: dict(tag, objects [(shape, colour, size or None)], where (a direction, "middle" or None))

KINDS = {  # of each tag: how many objects, of which sizes, and where the first may be
    "one object": (1, ["small", "large"], [*DIRECTIONS, "middle", None]),
    "two objects": (2, [None], [None]),
    "sizes": (2, ["small", "large"], [None]),
    "position": (2, [None], [*DIRECTIONS]),
    "sizes and position": (2, ["small", "large"], [*DIRECTIONS])}
TAGS = tuple(KINDS)


def one_of(rng, things):
    return things[rng.integers(len(things))]


def make_prompt(rng, tag, held_out=False):
    """A prompt of this tag; with `held_out`, one object has a held-out combination of shape and colour."""
    combinations = [(s, c) for s in SHAPES for c in COLORS if held_out or (s, c) not in HELD_OUT]
    count, sizes, places = KINDS[tag]
    objects = [combinations[i] for i in rng.choice(len(combinations), count, replace=False)]
    if held_out:
        objects[rng.integers(count)] = one_of(rng, sorted(HELD_OUT))
        if len(set(objects)) < count:
            return make_prompt(rng, tag, held_out)
    objects = [(*o, one_of(rng, sizes)) for o in objects]
    return dict(tag=tag, objects=objects, where=one_of(rng, places))


SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big"), None: ("",)}
PLACES = {"left": ("on the left", "at the left"), "right": ("on the right", "at the right"),
          "up": ("at the top", "near the top"), "down": ("at the bottom", "near the bottom"),
          "middle": ("in the middle", "in the center"), None: ("",)}
RELATIONS = {"left": ("to the left of", "on the left of"), "right": ("to the right of", "on the right of"),
             "up": ("above", "over"), "down": ("below", "under"), None: ("and", "with", "next to")}
OPENINGS = ("", "there is", "a picture of")
CONTENT = {*SHAPES, *COLORS, *sum(SIZE_WORDS.values(), ()), "left", "right", "top", "bottom", "middle", "center",
           "above", "over", "below", "under"}  # the words that say what to draw, and how


def write_caption(rng, prompt):
    """Plain English for a prompt, in one of several phrasings."""
    parts = [["a", one_of(rng, SIZE_WORDS[size]), color, shape] for shape, color, size in prompt["objects"]]
    places = RELATIONS if len(parts) == 2 else PLACES
    parts.insert(1, [one_of(rng, places[prompt["where"]])])
    words = [one_of(rng, OPENINGS), *sum(parts, [])]
    return " ".join(word for word in words if word)


def make_prompts(seed, count, held_out_share=0.0):
    """Prompts with different captions, tags in turn, a last share of them held out. `seed` is a list of integers."""
    rng, prompts, seen = np.random.default_rng([11, *seed]), [], set()
    while len(prompts) < count:
        held_out = len(prompts) >= count * (1 - held_out_share)
        prompt = make_prompt(rng, TAGS[len(prompts) % len(TAGS)], held_out)
        caption = write_caption(rng, prompt)
        if caption not in seen:
            prompts.append(prompt | dict(held_out=held_out, caption=caption))
            seen.add(caption)
    return prompts


def corrupt(rng, prompt):
    """The prompt with one thing wrong: a shape, a colour, a size or the place. No held-out combination comes in."""
    said = [*sum(prompt["objects"], ()), prompt["where"]]
    kinds = [SHAPES, COLORS, ("small", "large")] * len(prompt["objects"]) + [DIRECTIONS]
    while True:
        i, wrong = one_of(rng, [i for i, word in enumerate(said) if word]), list(said)
        wrong[i] = one_of(rng, [word for word in kinds[i] if word != said[i]])
        objects = [tuple(wrong[k:k + 3]) for k in range(0, len(wrong) - 1, 3)]
        if HELD_OUT & {o[:2] for o in objects} <= {o[:2] for o in prompt["objects"]}:
            return dict(prompt, objects=objects, where=wrong[-1])


# ---- the score: objects by colour and connected region, shape by template, size and place by bounding box


def find_objects(image, least=12):
    """The scene in a (32, 32, 3) uint8 image: connected regions of one colour, of at least `least` pixels."""
    palette = np.array([*COLORS.values(), BACKGROUND], float)
    nearest = np.square(image[:, :, None].astype(float) - palette).sum(-1).argmin(-1)
    scene = []
    for k, color in enumerate(COLORS):
        regions, _ = ndimage.label(nearest == k)
        for i, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
            own = regions[rows, columns] == i
            if own.sum() >= least:
                x, y = ((part.start + part.stop - 1) / 2 for part in (columns, rows))
                scene.append((which_shape(own), color, x, y, sum(own.shape) / 4))
    return scene


def which_shape(own):
    """The shape whose template, stretched to the bounding box that `own` fills, has most of its pixels (IoU)."""
    v, u = (0.95 * (2 * (np.indices(own.shape)[i] + 0.5) / own.shape[i] - 1) for i in (0, 1))  # 0.95: pixels are coarse
    return max(SHAPES, key=lambda s: (own & mask(s, u, v)).sum() / (own | mask(s, u, v)).sum())


def judge_image(image, prompt):
    """dict(correct, reason): whether an image, (32, 32, 3) uint8 or PIL, shows what is asked for and nothing else. The
    reason is the first thing wrong, of the match of objects that gets farthest: shapes, colors, sizes or place."""
    found, wanted, right = find_objects(np.array(image)), prompt["objects"], []
    if len(found) != len(wanted):
        return dict(correct=False, reason="number")
    for match in itertools.permutations(found):
        pairs = list(zip(match, wanted))
        right.append((all(m[0] == shape for m, (shape, _, _) in pairs),
                      all(m[1] == color for m, (_, color, _) in pairs),
                      all(size in (None, "large" if m[4] >= LARGE else "small") for m, (_, _, size) in pairs),
                      prompt["where"] is None or lies(*offset(match), prompt["where"])))
    reason = next((what for what, fine in zip(("shapes", "colors", "sizes", "place"), max(right)) if not fine), "")
    return dict(correct=not reason, reason=reason)
