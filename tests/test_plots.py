"""plots.py: what a run's log and a table of images look like as pictures."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

import toy2d
from lib import plots
from lib.files import UserError

pytestmark = pytest.mark.curves


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved from here on, by their path."""
    found = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: found.update({path: figure}))
    return found


def test_a_grid_has_titles_above_and_prompts_at_the_left(figures):
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    plots.draw_grid(["a red one", "cost $5 and $6 " * 40, None], [("first", images), ("second " * 9, images[::-1])], "g.png")
    axes = np.array(figures["g.png"].axes).reshape(3, 2)
    places = [(axis.get_subplotspec().rowspan.start, axis.get_subplotspec().colspan.start) for axis in axes.flat]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [axis.get_title().replace("\n", " ") for axis in axes[0]] == ["first", ("second " * 9).strip()]
    assert [axis.get_title() for axis in axes[1:].flat] == [""] * 4
    assert axes[0, 0].get_ylabel() == "a red one" and axes[1, 0].get_ylabel().count("\n") == 4  # five lines at most
    assert axes[0, 1].get_ylabel() == axes[0, 0].get_xlabel() == ""
    red, blue, green = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    shown = [[tuple(axis.images[0].get_array()[0, 0]) for axis in row] for row in axes]
    assert shown == [[red, green], [blue, blue], [green, red]]
    assert not axes[0, 0].title.get_parse_math() and not axes[1, 0].yaxis.label.get_parse_math()


def test_captions_stand_under_their_images(figures):
    images = [Image.new("RGB", (8, 8))] * 2
    plots.draw_grid(None, [("winner", images, ["c", None]), ("loser", images, ["c minus", "d"])], "g.png")
    assert [axis.get_xlabel() for axis in figures["g.png"].axes] == ["c", "c minus", "", "d"]
    assert all(axis.get_ylabel() == "" for axis in figures["g.png"].axes)


def test_curves_are_those_of_the_log(figures, tmp_path):
    rows = [dict(update=u, loss=0.7 - u / 100, winner=-u, loser=u, lr=1e-8, logit_quantiles=[u, u + 1, u + 2, u + 3, u + 4],
                 winner_by_t=[u, None, 1], loser_by_t=[0, 0, None]) for u in range(1, 21)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [dict(update=0, noise_floor=0.0), *rows]))
    plots.draw_curves(str(path))
    axes, there = figures[str(tmp_path / "curves.png")].axes, ["loss", "winner", "logit_quantiles", "winner_by_t", "lr"]
    titles = {names[0]: title for names, title, *_ in plots.CURVES}
    assert [axis.get_title() for axis in axes] == [titles[name] for name in there]  # what the log has
    panels = dict(zip(there, axes))
    drawn = {name: [list(line.get_ydata()) for line in axis.lines] for name, axis in panels.items()}
    assert list(panels["loss"].lines[0].get_xdata()) == list(range(1, 21))
    assert drawn["loss"] == [[row["loss"] for row in rows]]
    assert drawn["winner"] == [[row[name] for row in rows] for name in ("winner", "loser")]
    assert np.array(drawn["logit_quantiles"]).T.tolist() == [row["logit_quantiles"] for row in rows]
    winner, loser = (np.ma.filled(np.ma.array(line).astype(float), -1) for line in drawn["winner_by_t"])
    assert winner.tolist() == [19.5, -1, 1] and loser.tolist() == [0, 0, -1]  # the last tenth: updates 19 and 20
    assert panels["winner_by_t"].lines[0].get_xdata().tolist() == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    legend = ["winner: lower is better", "loser: higher is better"]
    assert [text.get_text() for text in panels["winner"].get_legend().get_texts()] == legend
    assert [text.get_text() for text in panels["winner_by_t"].get_legend().get_texts()] == legend
    assert panels["logit_quantiles"].get_legend().get_texts()[0].get_text() == "5 % of the pairs are below"
    assert all(axis.get_ylabel() for name, axis in panels.items() if name != "lr")
    assert not any(axis.yaxis.get_major_formatter().get_useOffset() for axis in axes)


@pytest.mark.parametrize("text", ["", '{"update": 0}\n',
                                  "[]\n", '{"update": 1, "loss": 2}\n{"update": 2}\n', '{"update": 1}\n{"loss": 2\n'])
def test_a_log_that_cannot_be_drawn_is_named(text, tmp_path):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"log.jsonl cannot be read \(.*\): it is no log of train.py with an update in it."):
        plots.draw_curves(str(tmp_path / "log.jsonl"))


def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    figure, _ = plots.plt.subplots()
    path = tmp_path / "new" / "p.png"
    plots.save_figure(figure, str(path))
    assert Image.open(path).size[0] > 500 and os.listdir(tmp_path / "new") == ["p.png"]
    before, (figure, _) = path.read_bytes(), plots.plt.subplots()

    def stop(*arguments):
        raise OSError("No space left on device")
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError):
        plots.save_figure(figure, str(path))
    assert path.read_bytes() == before


def test_a_picture_has_a_name_that_ends_in_png(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name in ("", "picture", "picture.jpg", "folder.png", "picture.png/"):
        with pytest.raises(UserError, match="must be the name of a picture to write, a file that ends in .png"):
            plots.try_path(os.path.join(tmp_path, name) if name else "")
    plots.try_path(str(tmp_path / "new" / "picture.PNG"))
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "new"] and os.listdir(tmp_path / "new") == []


def test_a_picture_of_matplotlib_is_written_anew_and_a_picture_of_another_program_is_not(tmp_path):
    path, (figure, _) = tmp_path / "p.png", plots.plt.subplots()
    plots.save_figure(figure, str(path))
    plots.try_path(str(path))  # as if nothing were there
    for content in (picture(), b"no picture", b""):
        path.write_bytes(content)
        for refuse in (lambda: plots.try_path(str(path)), lambda: toy2d.main(["--out", str(path)])):
            with pytest.raises((UserError, SystemExit), match=f"^{path} exists, and this program did not write it: give another name.$"):
                refuse()
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["p.png"]


def picture():
    """The bytes of a PNG file that Pillow wrote."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "png")
    return file.getvalue()
