"""GenEval 2's rules against its own code's answers, and its judge on a small random Qwen3-VL of the real class."""

import json

import numpy as np
import pytest
import tiny_judges
import torch
import transformers
from PIL import Image

from judges import geneval2, shared


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("judges") / "qwen")
    tiny_judges.qwen(folder)
    return folder


def test_questions_and_accepted_answers_are_the_official_ones():
    for case in tiny_judges.golden("geneval2_cases.json")["prompts"]:
        for (question, answer), asked in zip(case["vqa_list"], case["asked"], strict=True):
            assert geneval2.geneval2_answers(question, answer) == asked["answers"]
            assert f"{question} Answer in one word." == asked["text"]
            assert f"<|vision_end|>{asked['text']}<|im_end|>\n<|im_start|>assistant\n" in geneval2.MESSAGE.format("", question)


def test_scores_are_the_official_ones():
    cases = tiny_judges.golden("geneval2_cases.json")
    rows = [dict(row, probabilities=[asked["probability"] for asked in row["asked"]]) for row in cases["prompts"]]
    for row in rows:
        am, gm, _, atoms = geneval2.geneval2_summary([row])
        assert (am / 100, gm / 100) == (pytest.approx(row["am"], rel=1e-9), pytest.approx(row["gm"], rel=1e-9))
        assert atoms == {row["atom_count"]: gm}
    am, gm, skills, atoms = geneval2.geneval2_summary(rows)
    assert am == pytest.approx(cases["total_am"], rel=1e-9) and gm == pytest.approx(cases["total_gm"], rel=1e-9)
    assert skills == pytest.approx(cases["per_skill"], rel=1e-9)
    assert {str(count): x for count, x in atoms.items()} == pytest.approx(cases["per_atomicity"], rel=1e-9)
    values = geneval2.geneval2_values(rows)  # for intervals: the same means, one number a prompt
    assert len(values[0]) == len(values[1]) == len(rows) and sum(map(len, values[3].values())) == len(rows)
    assert len(values[2]["verb"]) == sum("verb" in row["skills"] for row in rows)


def test_a_score_of_zero_makes_the_geometric_mean_zero():
    am, gm, skills, atoms = geneval2.geneval2_summary([dict(probabilities=[0.0, 0.5], skills=["object", "count"], atom_count=3)])
    assert (am, gm, skills, atoms) == (25, 0, dict(object=0, count=50), {3: 0})


def test_a_token_that_begins_two_answers_counts_twice():
    p = torch.tensor([0.5, 0.25, 0.125])
    assert geneval2.geneval2_probability(p, [0, 2, 2]) == 0.75 and geneval2.geneval2_probability(p.tolist(), [1, 1, 1, 1, 1]) == 1.25


def questions(count):
    """Prompts with questions of different lengths, and images of two sizes."""
    rng, rows, images = np.random.default_rng(0), [], []
    for i in range(count):
        pairs = [["How many dogs are in the image?", "eight"], ["Are there any dogs?", "Yes"], ["How many cats sit on the very long green sofa?", "eleven"]]
        rows.append(dict(vqa_list=pairs[i % 2:]))
        images.append(Image.fromarray(rng.integers(0, 256, (64, 64 + 32 * (i % 2), 3), dtype=np.uint8)))
    return rows, images


def test_the_judge_sums_the_probabilities_of_the_first_tokens_of_the_accepted_answers(qwen, monkeypatch):
    """Against the model's own generate, one question after the other. A token that begins two answers counts twice."""
    monkeypatch.setattr(geneval2, "JUDGE", qwen)
    rows, images = questions(4)
    found = geneval2.load("cpu", "")(rows, images)
    net = transformers.Qwen3VLForConditionalGeneration.from_pretrained(qwen, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen)
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(qwen)
    for row, image, one in zip(rows, images, found, strict=True):
        expected = []
        for question, answer in row["vqa_list"]:
            seen = processor(image, return_tensors="pt")
            pads = "<|image_pad|>" * (image.width // 32 * image.height // 32)
            text = (f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{question} Answer in one word.<|im_end|>\n"
                    "<|im_start|>assistant\n")
            tokens = tokenizer(text, return_tensors="pt")
            out = net.generate(**tokens, **seen, mm_token_type_ids=(tokens.input_ids == net.config.image_token_id).int(), max_new_tokens=1,
                               do_sample=False, output_scores=True, return_dict_in_generate=True)
            p = out.scores[0][0].softmax(-1)
            digits = {"eight": ["8", " "], "eleven": ["o", " "], "Yes": []}[answer]  # this tokenizer's first tokens are letters
            first = [answer[0], answer[0].upper(), " ", " "] if digits else ["Y", "y", " ", " "]
            expected.append(sum(p[tokenizer(letter).input_ids[0]].item() for letter in first + digits))
        assert one["probabilities"] == pytest.approx(expected, abs=1e-6)
        assert one["value"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert len({round(p, 5) for one in found for p in one["probabilities"]}) == sum(len(row["vqa_list"]) for row in rows)


@pytest.mark.parametrize("at_once", [1, 3])
def test_questions_in_a_batch_are_answered_as_one_by_one(at_once, qwen, monkeypatch):
    monkeypatch.setattr(geneval2, "JUDGE", qwen)
    rows, images = questions(5)
    judge = geneval2.load("cpu", "")
    together = [one["probabilities"] for one in judge(rows, images)]
    monkeypatch.setattr(geneval2, "AT_ONCE", at_once)
    for p, q in zip(together, judge(rows, images), strict=True):
        assert p == pytest.approx(q["probabilities"], abs=2e-7)


def test_a_gpu_gets_bfloat16_and_anything_else_float32(monkeypatch):
    asked = []
    monkeypatch.setattr(geneval2, "from_hub", lambda kind, name, *place: asked.append((kind, name, *place)))
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        geneval2.load(device, "")
    judge = ("Qwen3VLForConditionalGeneration", "Qwen/Qwen3-VL-8B-Instruct")
    assert [one for one in asked if len(one) > 2] == [(*judge, torch.device("cuda", 1), torch.bfloat16), (*judge, torch.device("cpu"), torch.float32)]
    assert {one[1] for one in asked} == {"Qwen/Qwen3-VL-8B-Instruct"} and len(asked) == 6


def test_the_list_is_the_official_file_with_places(tmp_path):
    tiny_judges.lists(str(tmp_path))
    rows = geneval2.items(str(tmp_path))
    lines = [json.loads(line) for line in open(tmp_path / "geneval2" / "geneval2_data.jsonl")]
    assert rows == [line | dict(path=f"geneval2/{i:05d}.png", group="geneval2", index=i) for i, line in enumerate(lines)]
    assert shared.list_checksum(rows) != shared.list_checksum(rows[:-1])
