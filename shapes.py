"""The paper's experiment (Sec. 4, Tables 1a, 3b) on a laptop: a small world, a small Stable Diffusion, a score by rule.

    python shapes.py --quick      a few minutes on two CPU cores: a tuned model, a table and a picture
    python shapes.py              one seed of the full experiment

Images of 32 x 32 pixels show one or two objects, and captions say which: "a red circle to the left of a blue square". A
StableDiffusionPipeline of the real classes is trained from scratch on captions of which half are wrong, as in Fig. 2b
and as on the web. Then perturb.py, build_pairs.py and train.py do with it what they do with SD-1.4, and each image is
scored by finding its objects, so that no neural judge is needed. All is kept in runs/, and a stopped run goes on.
"""

import argparse
import itertools
import json
import os
import sys

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from scipy import ndimage

transformers.logging.set_verbosity_error()
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

import build_pairs  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
import perturb  # noqa: E402
import plots  # noqa: E402
import train  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# ---- the world: a scene is a list of (shape, colour, x, y, radius)

SIZE, BACKGROUND = 32, (235, 235, 235)
COLORS = {"red": (215, 40, 40), "green": (40, 165, 60), "blue": (50, 80, 220), "yellow": (240, 205, 30),
          "purple": (160, 50, 180), "black": (25, 25, 25)}
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
HELD_OUT = {("circle", "yellow"), ("square", "purple"), ("triangle", "blue")}  # never together in a training image
TAGS = ("single object", "colors", "two objects", "color attribution", "position")  # GenEval's, without counting


def mask(shape, u, v):
    """Where a shape is, u and v being coordinates in its bounding box [-1, 1]^2, v downwards."""
    inside = (abs(u) <= 1) & (abs(v) <= 1)
    if shape == "circle":
        return u**2 + v**2 <= 1
    return inside if shape == "square" else inside & (abs(u) <= (v + 1) / 2)


def render(scene):
    """A scene -> (32, 32, 3) uint8."""
    image = np.full((SIZE, SIZE, 3), BACKGROUND, np.uint8)
    v, u = np.mgrid[:SIZE, :SIZE]
    for shape, color, x, y, radius in scene:
        image[mask(shape, (u - x) / radius, (v - y) / radius)] = COLORS[color]
    return image


def make_scene(rng, objects, relation=None):
    """Places one or two (shape, colour) without touching, in the relation if one is given (the first to the second)."""
    while True:
        radius = rng.uniform(4, 6.5, len(objects))
        x, y = (rng.uniform(radius + 0.5, SIZE - 1.5 - radius) for _ in range(2))
        scene = [(*o, *place) for o, place in zip(objects, zip(x, y, radius))]
        if len(objects) == 1:
            return scene
        dx, dy = x[0] - x[1], y[0] - y[1]
        apart = max(abs(dx), abs(dy)) >= radius.sum() + 2
        if apart and (relation is None or related(dx, dy, relation, clearly=1.4)):
            return scene


def related(dx, dy, relation, clearly=1.0):
    """Whether an offset of centres, in pixels, is in this direction: more along it than across, `clearly` times."""
    along, across = (dx * RELATIONS[relation][0], dy) if RELATIONS[relation][0] else (dy * RELATIONS[relation][1], dx)
    return along > clearly * abs(across)


def make_prompt(rng, tag, held_out=False):
    """What a caption of this tag asks for: dict(tag, objects, relation); the colour of an object may be open, None."""
    pairs = [(s, c) for s in SHAPES for c in COLORS if held_out or (s, c) not in HELD_OUT]
    held = [p for p in pairs if p in HELD_OUT]
    count = 1 if tag in TAGS[:2] else 2
    objects = [pairs[i] for i in rng.choice(len(pairs), count, replace=False)]
    if held_out:
        objects[rng.integers(count)] = held[rng.integers(len(held))]
    if count == 2 and objects[0][0] == objects[1][0] and (tag in TAGS[2::2] or objects[0] == objects[1]):
        return make_prompt(rng, tag, held_out)  # "a circle and a circle" says too little
    if tag in ("single object", "two objects", "position"):
        objects = [(shape, None) for shape, _ in objects]
    return dict(tag=tag, objects=objects, relation=str(rng.choice(list(RELATIONS))) if tag == "position" else None)


def write_caption(rng, prompt):
    """Plain English for a prompt, in one of several phrasings."""
    names = [f"a {color} {shape}" if color else f"a {shape}" for shape, color in prompt["objects"]]
    if prompt["relation"]:
        side = prompt["relation"].removesuffix(" of")
        middle = [f"to the {side} of", f"on the {side} of"] if side in ("left", "right") else [side, f"which is {side}"]
        text = f"{names[0]} {rng.choice(middle)} {names[1]}"
    else:
        text = f" {rng.choice(['and', 'with', 'next to'])} ".join(names)
    return str(rng.choice(["", "a picture of ", "an image of ", "there is "])) + text


def fill(rng, prompt):
    """A scene as the prompt wants it, its open colours drawn (never a held-out combination)."""
    objects = []
    for shape, color in prompt["objects"]:
        free = [c for c in COLORS if (shape, c) not in HELD_OUT]
        objects.append((shape, color or free[rng.integers(len(free))]))
    return make_scene(rng, objects, prompt["relation"])


def corrupt(rng, prompt):
    """The prompt with one thing wrong: a shape, a colour or the relation."""
    wrong = dict(prompt, objects=list(prompt["objects"]))
    i = rng.integers(len(wrong["objects"]))
    said = [*wrong["objects"][i], prompt["relation"]]  # shape, colour and relation, None where the prompt has none
    kinds = [k for k in range(3) if said[k] is not None]
    kind = kinds[rng.integers(len(kinds))]
    others = [x for x in (SHAPES, COLORS, RELATIONS)[kind] if x != said[kind]]
    said[kind] = others[rng.integers(len(others))]
    wrong["objects"][i], wrong["relation"] = (said[0], said[1]), said[2]
    return wrong


# ---- the score: objects by colour and connected region, shape by template, relation by centres


def find_objects(image, least=14):
    """[(shape, colour, x, y)] in a (32, 32, 3) uint8 image: connected regions of at least `least` pixels."""
    palette = np.array([*COLORS.values(), BACKGROUND], float)
    nearest = np.square(image[:, :, None].astype(float) - palette).sum(-1).argmin(-1)
    found = []
    for k, color in enumerate(COLORS):
        regions, _ = ndimage.label(nearest == k)
        for i, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
            own = regions[rows, columns] == i
            if own.sum() >= least:
                x, y = ((part.start + part.stop - 1) / 2 for part in (columns, rows))
                found.append((which_shape(own), color, x, y))
    return found


def which_shape(own):
    """The shape whose template, stretched to the bounding box that `own` fills, has most of its pixels (IoU)."""
    v, u = (2 * (np.indices(own.shape)[i] + 0.5) / own.shape[i] - 1 for i in (0, 1))
    return max(SHAPES, key=lambda s: (own & mask(s, u, v)).sum() / (own | mask(s, u, v)).sum())


def verdict(found, prompt):
    """dict(correct, shapes, reason): whether the objects found are those asked for and no others, in the relation."""
    wanted = prompt["objects"]
    right_shapes = sorted(s for s, *_ in found) == sorted(s for s, _ in wanted)
    if len(found) != len(wanted):
        return dict(correct=False, shapes=False, reason=f"{len(found)} objects, not {len(wanted)}")
    for match in itertools.permutations(found):
        if all(m[0] == s and c in (None, m[1]) for m, (s, c) in zip(match, wanted)):
            relation, (x, y) = prompt["relation"], [match[0][i] - match[-1][i] for i in (2, 3)]
            if relation is None or related(x, y, relation):
                return dict(correct=True, shapes=True, reason="")
    return dict(correct=False, shapes=right_shapes, reason="colour or relation" if right_shapes else "shape")


# ---- the model, from scratch: an autoencoder, then a U-Net and a text encoder on captions of which many are wrong

WRONG_CAPTIONS = 0.5  # guess: half of the captions have one thing wrong
NO_CAPTION = 0.1  # dropped, so that guidance works (as Stable Diffusion was trained)


def make_dataset(seed, count):
    """count images (uint8), and for each the caption that training sees: half of them wrong, and a tenth empty."""
    rng = np.random.default_rng([10, seed])
    images, captions = [], []
    for _ in tqdm(range(count), "world", leave=False):
        prompt = make_prompt(rng, TAGS[rng.integers(len(TAGS))])
        images.append(render(fill(rng, prompt)))
        said = corrupt(rng, prompt) if rng.random() < WRONG_CAPTIONS else prompt
        captions.append("" if rng.random() < NO_CAPTION else write_caption(rng, said))
    return np.stack(images), captions


def fit(modules, loss_of_batch, count, updates, batch, lr, seed, what, keep):
    """AdamW with a cosine decay to 0 on random batches of indices below count. Its state is kept in the file `keep`
    every 100 updates, so that a stopped training continues exactly from there."""
    parameters = [p for m in modules for p in m.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, updates, pct_start=0.05)
    rng, start = torch.Generator().manual_seed(seed), 0
    if os.path.exists(keep):
        state = torch.load(keep, weights_only=True)
        for part, saved in zip([*modules, optimizer, decay], state["parts"]):
            part.load_state_dict(saved)
        rng.set_state(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        start = state["update"]
    for update in tqdm(range(start, updates), what, initial=start, total=updates):
        loss = loss_of_batch(torch.randint(count, (batch,), generator=rng), rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()
        if (update + 1) % 100 == 0 or update + 1 == updates:
            parts = [part.state_dict() for part in (*modules, optimizer, decay)]
            state = dict(update=update + 1, parts=parts, rng=rng.get_state(), torch_rng=torch.get_rng_state())
            torch.save(state, keep + ".partial")
            os.replace(keep + ".partial", keep)
    for m in modules:
        m.eval()


def make_tokenizer(captions):
    """A CLIP tokenizer to which each word of this world is one token."""
    words = sorted({w for caption in captions for w in caption.split()})
    base = CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1}, [])
    return base.train_new_from_iterator(words * 10, 600)


def train_reference(folder, seed, size, device):
    """Writes the pipeline folder of the reference model."""
    torch.manual_seed(seed)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    count = size["images"]
    images, captions = make_dataset(seed, count)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)  # (count, 3, 32, 32)

    def batch_of(i):
        return pixels[i.to(device)].float() / 127.5 - 1

    vae = AutoencoderKL(block_out_channels=(16, 32, 32), norm_num_groups=8, latent_channels=4, layers_per_block=1,
                        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
                        sample_size=SIZE).to(device)

    def vae_loss(i, rng):
        posterior = vae.encode(batch_of(i)).latent_dist
        return F.mse_loss(vae.decode(posterior.sample()).sample, batch_of(i)) * 10 + 1e-4 * posterior.kl().mean() / 64

    fit([vae], vae_loss, count, size["autoencoder"], 32, 3e-3, seed, "autoencoder", folder + "-1.pt")
    with torch.no_grad():
        latents = torch.cat([vae.encode(batch_of(i)).latent_dist.mean for i in torch.arange(count).split(256)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    latents *= vae.config.scaling_factor

    tokenizer = make_tokenizer(captions)
    tokenizer.model_max_length = 16
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )).to(device)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 96), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        cross_attention_dim=64, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).to(device)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)  # SD-1.4's schedule

    def denoising_loss(i, rng):
        t = torch.randint(1000, (len(i),), generator=rng)
        eps = torch.randn(len(i), 4, 8, 8, generator=rng)
        x_t = scheduler.add_noise(latents[i.to(device)], eps.to(device), t.to(device))
        return F.mse_loss(unet(x_t, t.to(device), text_encoder(ids[i.to(device)])[0]).sample, eps.to(device))

    fit([unet, text_encoder], denoising_loss, count, size["reference"], 128, 1e-3, seed, "reference", folder + "-2.pt")
    StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
                            ).save_pretrained(folder + ".partial")
    os.replace(folder + ".partial", folder)
    for stage in (1, 2):
        os.remove(folder + f"-{stage}.pt")


# ---- the experiment, by the commands that a user would give

METHODS = {"D-DPO": ["--objective", "diffusion-dpo"], "DDSPO": [], "Rand-positive": ["--negatives", "rand-positive"],
           "Not-paired": ["--negatives", "not-paired"]}  # Tables 1a and 3b; the last two are DDSPO without made losers
SETTINGS = {"D-DPO": (200, 3e-5), "DDSPO": (1000, 3e-5), "Rand-positive": (200, 1e-4), "Not-paired": (1000, 3e-5)}
# ^ beta and lr: each method's best of GRID by `--grid`
GRID = dict(beta=[200, 1000], lr=[1e-5, 3e-5, 1e-4])
GRID_SEED = 100  # settings are chosen on a seed that is not reported
FULL = dict(autoencoder=800, reference=2000, images=16384, pairs=1024, updates=80, prompts=400)
QUICK = dict(autoencoder=200, reference=400, images=3072, pairs=64, updates=8, prompts=50)
GUIDANCE = (1.0, 3.0, 7.5)
PAIR_GUIDANCE = 3  # guess: the small model's images are best there
QUARTERS = (1, 2, 3, 4)  # of the updates: when the alignment is measured


def command(script, *flags):
    """Runs a script of this repository as from the command line."""
    flags = [str(flag) for flag in flags]
    print(f"\n$ python {script.__name__}.py " + " ".join(flags))
    script.main(flags)


def make_prompts(seed, count, held_out_share=0.0):
    """count prompts, the tags in turn, each with its caption; the last share of them with held-out combinations."""
    rng = np.random.default_rng([11, *seed])
    prompts = []
    for i in range(count):
        held_out = i >= count * (1 - held_out_share)
        prompt = make_prompt(rng, ("colors", "color attribution")[i % 2] if held_out else TAGS[i % 5], held_out)
        prompts.append(prompt | dict(held_out=held_out, caption=write_caption(rng, prompt)))
    return prompts


def prepare(home, seed, size, device):
    """Makes the reference, its training prompts and its pairs for one seed; the reference's folder."""
    reference, prompts = os.path.join(home, "reference"), os.path.join(home, "prompts.jsonl")
    perturbed = os.path.join(home, "perturbed.jsonl")
    if not os.path.exists(reference):
        train_reference(reference, seed, size, device)
    rows = make_prompts([seed, 1], size["pairs"])
    perturb.write_text(prompts, perturb.to_lines(dict(prompt=row["caption"]) for row in rows))
    command(perturb, prompts, perturbed, "--seed", seed)
    command(build_pairs, "--model", reference, "--prompts", perturbed, "--out", os.path.join(home, "pairs"),
            "--guidance", PAIR_GUIDANCE, "--batch-size", 64)
    return reference


def tune(home, method, setting, updates, out):
    """Tunes the reference of this home and returns the folder of the result."""
    command(train, "--model", os.path.join(home, "reference"), "--pairs", os.path.join(home, "pairs"), "--out", out,
            *METHODS[method], "--beta", setting[0], "--lr", setting[1], "--batch-size", 64, "--micro-batch", 64,
            "--warmup", 0, "--updates", updates, "--save-every", updates)
    return os.path.join(out, "pipeline")


@torch.no_grad()
def score(path, folder, prompts, guidance, device, batch=100):
    """One image a prompt, image i from the noise of seed i: dict(correct, shapes, reason, each a list, and frechet).
    Kept in the file `path`, so that a stopped experiment continues."""
    if not os.path.exists(path):
        model = models.load(folder, device)
        verdicts, features = [], []
        for i in tqdm(range(0, len(prompts), batch), f"score {folder}, guidance {guidance:g}", leave=False):
            part = prompts[i:i + batch]
            seeds, captions = range(i, i + len(part)), [p["caption"] for p in part]
            images = np.stack(evaluate.sample_images(model, captions, seeds, 25, guidance))
            verdicts += [verdict(find_objects(image), p) for image, p in zip(images, part)]
            features.append(features_of(model, images))
        rng = np.random.default_rng(12)
        truth = features_of(model, np.stack([render(fill(rng, p)) for p in prompts * 5]))
        row = {key: [v[key] for v in verdicts] for key in ("correct", "shapes", "reason")}
        moments = [x for f in (torch.cat(features), truth) for x in (f.mean(0), f.T.cov())]
        perturb.write_text(path, json.dumps(row | dict(frechet=evaluate.frechet(*moments))))
    with open(path) as file:
        return json.load(file)


def features_of(model, images):
    """What the Fréchet distance compares, float64 (n, 64): the latents of the autoencoder, which no method changes,
    averaged to 4 x 4 places. Images of another layout, colour or sharpness than true ones differ there."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(model.pipe.device) / 127.5 - 1
    return F.avg_pool2d(model.pipe.vae.encode(x).latent_dist.mean, 2).flatten(1).double().cpu()


def experiment(home, seed, size, device):
    """One seed, every method: (prompts, {model: {guidance: scores}}, {method: [share right after each quarter]})."""
    folders, curves = {"Reference": prepare(home, seed, size, device)}, {method: [] for method in METHODS}
    prompts = make_prompts([seed, 2], size["prompts"], held_out_share=0.25)
    for method, quarter in itertools.product(METHODS, QUARTERS):
        last = quarter == QUARTERS[-1]
        path = os.path.join(home, f"{method}-guidance{GUIDANCE[0]:g}{'' if last else f'-quarter{quarter}'}.json")
        if last or not os.path.exists(path):
            folders[method] = tune(home, method, SETTINGS[method], size["updates"] * quarter // QUARTERS[-1],
                                   os.path.join(home, method))
        curves[method].append(np.mean(score(path, folders.get(method), prompts, GUIDANCE[0], device)["correct"]))
    results = {name: {g: score(os.path.join(home, f"{name}-guidance{g:g}.json"), folder, prompts, g, device)
                      for g in GUIDANCE} for name, folder in folders.items()}
    return prompts, results, curves


def grid(size, device):
    """Every method with every setting of GRID, on a seed of its own: prints the share of prompts with all right."""
    home = f"runs/shapes-{GRID_SEED}"
    prepare(home, GRID_SEED, size, device)
    prompts = make_prompts([GRID_SEED, 3], 200)
    lines = ["| method | beta | lr | all right, guidance 1 |", "| --- | --- | --- | --- |"]
    for method in METHODS:
        share = {}
        for setting in itertools.product(GRID["beta"], GRID["lr"]):
            out = os.path.join(home, "grid", f"{method}-{setting[0]}-{setting[1]}")
            if not os.path.exists(out + ".json"):
                tune(home, method, setting, size["updates"], out)
            share[setting] = np.mean(score(out + ".json", out + "/pipeline", prompts, GUIDANCE[0], device)["correct"])
        best = max(share, key=share.get)
        lines += [f"| {method} | {beta} | {lr} | {value:.3f}" + " (best)" * ((beta, lr) == best) + " |"
                  for (beta, lr), value in share.items()]
    print("\n" + "\n".join(lines))


# ---- the table and the pictures


def interval(values, rng, draws=2000):
    """The mean of values (seeds, prompts) and its 95 % interval, from resampling each seed's prompts."""
    values = np.asarray(values, float)
    picks = rng.integers(values.shape[1], size=(draws, *values.shape))
    low, high = np.percentile(np.take_along_axis(values[None], picks, 2).mean((1, 2)), [2.5, 97.5])
    return values.mean(), low, high


def table(runs):
    """Two tables for each guidance: the share of prompts with everything right, with paired differences; and by tag."""
    rng, lines = np.random.default_rng(0), []
    held_out = np.array([[p["held_out"] for p in prompts] for prompts, _, _ in runs])
    tags = np.array([[p["tag"] for p in prompts] for prompts, _, _ in runs])
    for g in GUIDANCE:
        right = {name: np.array([results[name][g]["correct"] for _, results, _ in runs], float) for name in runs[0][1]}
        lines += [f"| guidance {g:g} | all right | less the reference | less D-DPO | Fréchet distance ↓ |",
                  "| --- " * 5 + "|"]
        for name, values in right.items():
            cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*interval(values, rng))]
            for other in ("Reference", "D-DPO"):
                difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval(values - right[other], rng))
                cells.append("" if name in ("Reference", other) else difference)
            cells.append(f"{np.mean([results[name][g]['frechet'] for _, results, _ in runs]):.2f}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", f"| guidance {g:g} | " + " | ".join(TAGS) + " | held out | shapes right |", "| --- " * 8 + "|"]
        for name, values in right.items():
            cells = [values[(tags == tag) & ~held_out].mean() for tag in TAGS]
            cells += [values[held_out].mean(), np.mean([results[name][g]["shapes"] for _, results, _ in runs])]
            lines.append(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def draw_curves(runs, updates, path):
    """The share of prompts with everything right, at guidance 1, during training: the mean over seeds."""
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    start = np.mean([results["Reference"][GUIDANCE[0]]["correct"] for _, results, _ in runs])
    for method in METHODS:
        shares = [start, *np.mean([curves[method] for _, _, curves in runs], 0)]
        axis.plot([updates * q // QUARTERS[-1] for q in (0, *QUARTERS)], shares, marker="o", label=method)
    axis.set(xlabel="updates", ylabel="prompts with everything right")
    axis.legend(fontsize=8)
    plots.save_figure(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="all small, to see that it works: scores mean little")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0 on")
    parser.add_argument("--grid", action="store_true", help="try every method with every beta and lr instead")
    args = parser.parse_args(argv)
    perturb.check_flags(args, seeds=1)
    if args.grid and (args.quick or args.seeds > 1):
        sys.exit("--grid is run in full size on a seed of its own: give neither --quick nor --seeds with it.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.grid:
        return grid(FULL, device)

    size, name = (QUICK, "shapes-quick") if args.quick else (FULL, "shapes")
    homes = [f"runs/{name}-{seed}" for seed in range(args.seeds)]
    runs = [experiment(home, seed, size, device) for seed, home in enumerate(homes)]
    captions = "".join(p["caption"] + "\n" for p in runs[0][0])
    perturb.write_text(os.path.join(homes[0], "test-prompts.txt"), captions)
    folders = [os.path.join(homes[0], "reference"), *[os.path.join(homes[0], m, "pipeline") for m in METHODS]]
    out = homes[0] if args.quick else "figures"
    command(evaluate, "grid", "--models", *folders, "--prompts", os.path.join(homes[0], "test-prompts.txt"),
            "--guidance", GUIDANCE[0], "--rows", 8, "--batch-size", 8, "--out", os.path.join(out, "shapes.png"))
    draw_curves(runs, size["updates"], os.path.join(out, "shapes-curves.png"))
    print("\n" + table(runs))
    if args.quick:
        print("This was the quick run: its reference has hardly learned to draw. The full one: python shapes.py")


if __name__ == "__main__":
    main()
