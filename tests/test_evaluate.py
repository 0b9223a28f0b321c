"""evaluate.py: Fig. 3's grid, image by image."""

import os

import numpy as np
import pytest
import torch

import evaluate
import models


def arguments(**changes):
    return type("args", (), dict(seed=3, batch_size=2, steps=2, guidance=7.5) | changes)


def test_image_i_depends_on_its_prompt_and_seed_plus_i_only(sd):
    model, prompts = models.load(sd), ["a red fox", "a blue cup", "an old boat"]
    images = [np.array(x, dtype=float) for x in evaluate.generate(model, "tiny", prompts, arguments())]
    assert len(images) == 3 and images[0].shape == (64, 64, 3)
    alone, = evaluate.generate(model, "tiny", prompts[1:2], arguments(seed=4, batch_size=1))
    assert abs(np.array(alone, dtype=float) - images[1]).max() <= 2  # of 255: another batch rounds differently
    x_T = models.initial_noise(5, model.latent_shape)[None]
    direct, = models.sample(model, model.encode(prompts[2:]), x_T, 2, 7.5, output_type="pil")
    assert abs(np.array(direct, dtype=float) - images[2]).max() <= 2
    assert abs(images[0] - images[1]).mean() > 2


def test_the_grid_has_a_row_a_prompt_and_a_column_a_model(sd, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red fox for $5 and $x^2 _{ 6\n\na blue cup\nan old boat\n")
    shown = []
    monkeypatch.setattr(evaluate.plt.Axes, "imshow", lambda axis, image: shown.append((axis, image)))
    evaluate.main(["grid", "--models", sd, sd, "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "g.png"),
                   "--rows", "2", "--steps", "2"])
    assert os.path.getsize(tmp_path / "g.png") > 1000
    assert len(shown) == 4 and len({id(axis) for axis, _ in shown}) == 4
    places = {(axis.get_subplotspec().rowspan.start, axis.get_subplotspec().colspan.start): image for axis, image in shown}
    assert (np.array(places[0, 0]) == np.array(places[0, 1])).all()  # the same model twice
    assert (np.array(places[0, 0]) != np.array(places[1, 0])).any()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("flags, message", [
    (["--prompts", "none.txt"], "no file none.txt"), (["--prompts", os.devnull], "no file"),
    (["--prompts", __file__, "--out", "."], "--out . is a folder"),
    (["--prompts", __file__, "--rows", "0"], "--rows must be 1 or more"),
])
def test_mistakes_end_in_one_sentence(flags, message, sd):
    with pytest.raises(SystemExit, match=message):
        evaluate.main(["grid", "--models", sd, *flags])
