"""The benchmark of shapes.py: 400 prompts of the small world, judged by rule (lib/shapes_world.py)."""

from lib import shapes_world as world
from lib.files import UserError


def items(data):
    """The 400 prompts of the benchmark, a quarter of them with held-out combinations; one image each."""
    prompts = world.make_prompts([0, 2], 400, held_out_share=0.25)
    return [dict(path=f"shapes/{i:05d}.png", prompt=p["caption"], group=p["tag"], index=i // len(world.TAGS),
                 metadata=p) for i, p in enumerate(prompts)]


def load(device, data):
    """The judge by rule; it needs no network and no data."""
    def judge(rows, images):
        if images[0].size != (world.SIZE, world.SIZE):
            raise UserError(f"the shapes benchmark needs images of {world.SIZE} x {world.SIZE} pixels, not "
                            f"{images[0].size}.")
        return [world.judge_image(image, row["metadata"]) for row, image in zip(rows, images)]
    return judge
