"""Shared by all tests: one thread, no network, and a tiny Stable Diffusion with its pairs, made once."""

import json
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.path.dirname(__file__)])

import pytest
import tiny_models
import torch

import build_pairs
from lib import plots

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_curves(request, monkeypatch):
    """The picture of a run takes a second: only those tests draw it that have the mark `curves`."""
    if not request.node.get_closest_marker("curves"):
        monkeypatch.setattr(plots, "draw_curves", lambda path: None)


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """The path of a Stable Diffusion 1.x folder with small random weights."""
    folder = str(tmp_path_factory.mktemp("models") / "tiny-sd")
    tiny_models.make(folder)
    return folder


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory):
    """{family: path} of a small random-weight folder of every family in tiny_models."""
    folders = {family: str(tmp_path_factory.mktemp("families") / family) for family in tiny_models.FAMILIES}
    for family, folder in folders.items():
        tiny_models.make(folder, family)
    return folders


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """The path of a perturbed.jsonl with 10 pairs of prompts."""
    path = tmp_path_factory.mktemp("prompts") / "perturbed.jsonl"
    things = ["red fox", "blue cup", "old boat", "green hat", "tall tree", "small dog", "grey owl", "wet road", "tin can", "moon"]
    rows = [dict(id=f"p{i}", c=f"a {x} on a hill", c_minus=f"{x.split()[0]} hill") for i, x in enumerate(things)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def pairs(sd, prompts, tmp_path_factory):
    """The path of a pair store of 10 pairs in shards of 3."""
    folder = str(tmp_path_factory.mktemp("pairs") / "store")
    build_pairs.main(["--model", sd, "--prompts", prompts, "--out", folder, "--steps", "2", "--shard-size", "3"])
    return folder


def read_folder(folder):
    """{relative path: bytes} of all files in a folder, but for the lock."""
    files = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names if name != ".lock"]
    return {os.path.relpath(f, folder): open(f, "rb").read() for f in files}
