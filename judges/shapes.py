"""The benchmark of shapes.py: 400 prompts of the small world, judged by rule (lib/shapes_world.py)."""

from lib.files import UserError
from lib.shapes_world import SIZE, TAGS, judge_image, make_prompts


def items(data):
    """The 400 prompts of the benchmark, a quarter of them with held-out combinations; one image each."""
    return [dict(path=f"shapes/{i:05d}.png", prompt=p["caption"], group=p["tag"], index=i // len(TAGS), metadata=p)
            for i, p in enumerate(make_prompts([0, 2], 400, held_out_share=0.25))]


def load(device, data):
    """The judge by rule; it needs no network and no data."""
    def judge(rows, images):
        if sizes := {image.size for image in images} - {(SIZE, SIZE)}:
            raise UserError(f"the shapes benchmark needs images of {SIZE} x {SIZE} pixels, not {max(sizes)}.")
        return [judge_image(image, row["metadata"]) for row, image in zip(rows, images)]
    return judge
