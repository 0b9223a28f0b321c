"""GenEval 2 (arXiv 2512.16853; none of the paper's benchmarks): 800 prompts, an image each, by the rules of
facebookresearch/GenEval2 (evaluation.py, soft_tifa_analysis.py; prompts and code: CC BY-NC 4.0).

Soft-TIFA: Qwen3-VL-8B-Instruct sees the image and is asked about each object, attribute, number, position and verb of
the prompt. The score of a question is the probability that the first token of the answer begins an accepted answer. AM
and GM are the arithmetic and the geometric mean of a prompt's scores; the benchmark's are their means in percent.

As in the official code, a token that begins two accepted answers counts twice, so that a score may be above 1. What
differs: questions are asked in batches, and images whose sides are no multiples of 32 are resized by Pillow.
"""

import json

import numpy as np
import torch

from judges.shared import fetch_lines, from_hub

DATA = ("https://raw.githubusercontent.com/facebookresearch/GenEval2/a6e82d2289e8d418f27f0adee77908b07060eea3/"
        "geneval2_data.jsonl")
JUDGE, AT_ONCE = "Qwen/Qwen3-VL-8B-Instruct", 32  # and how many questions are in a batch (guess)
MESSAGE = ("<|im_start|>user\n<|vision_start|>{}<|vision_end|>{} Answer in one word.<|im_end|>\n"
           "<|im_start|>assistant\n")  # the model's chat template
DIGITS = dict(zip("one two three four five six seven eight nine ten".split(), map(str, range(1, 11))))


def items(data):
    """An image a prompt, with the file's own `vqa_list`, `skills` and `atom_count`."""
    return [json.loads(line) | dict(path=f"geneval2/{i:05d}.png", group="geneval2", index=i)
            for i, line in enumerate(fetch_lines(data, "geneval2/geneval2_data.jsonl", DATA))]


def geneval2_answers(question, answer):
    """The texts that are accepted as an answer."""
    if not question.startswith("How many"):
        return ["Yes", "yes", " yes", " Yes"]
    words, digits = [answer, answer.capitalize()], DIGITS.get(answer, "other")
    return [*words, *[" " + word for word in words], digits, " " + digits]


def geneval2_probability(probabilities, token_ids):
    """The score of a question: the sum of the `probabilities` (vocabulary,) of the first tokens of its answers."""
    return sum(float(probabilities[token]) for token in token_ids)


def geneval2_values(rows):
    """What the scores are means of, in percent: AM, GM, {skill: AM} and {atom_count: GM}, each (prompts,), of rows with
    `probabilities` and `skills` (questions,) and `atom_count`. A skill's score is the mean over questions; its values
    here are the sums over a prompt's questions, divided by how many of them such a prompt has on average."""
    p = [100 * np.array(row["probabilities"], float) for row in rows]
    am, atoms = np.array([x.mean() for x in p]), np.array([row["atom_count"] for row in rows])
    with np.errstate(divide="ignore"):  # log 0 = -inf, and exp of that is 0 again
        gm = np.array([np.exp(np.log(x).mean()) for x in p])
    skills = {}
    for skill in sorted({skill for row in rows for skill in row["skills"]}):
        own = [x[np.array(row["skills"]) == skill] for x, row in zip(p, rows) if skill in row["skills"]]
        skills[skill] = np.array([x.sum() for x in own]) / np.mean([len(x) for x in own])
    return am, gm, skills, {count: gm[atoms == count] for count in np.unique(atoms).tolist()}


def geneval2_summary(rows):
    """Soft-TIFA AM and GM, {skill: AM} and {atom_count: GM}, in percent."""
    am, gm, *parts = geneval2_values(rows)
    return am.mean(), gm.mean(), *[{key: x.mean() for key, x in part.items()} for part in parts]


def first_token(net, tokenizer, seen, questions):
    """P(first token of the answer), (B, vocabulary), of B questions about an image each; it is `seen` as Qwen's image
    processor gives it: (patches, D) and (1, 3)."""
    merged = net.config.vision_config.spatial_merge_size ** 2  # so many patches are one token
    texts = [MESSAGE.format("<|image_pad|>" * (len(patches) // merged), question)
             for (patches, _), question in zip(seen, questions)]
    tokens = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(net.device)
    patches, grids = (torch.cat(parts).to(net.device) for parts in zip(*seen))
    logits = net(**tokens, mm_token_type_ids=(tokens.input_ids == net.config.image_token_id).int(), logits_to_keep=1,
                 pixel_values=patches.to(net.dtype), image_grid_thw=grids, use_cache=False).logits
    return logits[:, -1].float().softmax(-1).cpu()


def load(device, data):
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    net = from_hub("Qwen3VLForConditionalGeneration", JUDGE, device, dtype)
    tokenizer, processor = from_hub("AutoTokenizer", JUDGE), from_hub("Qwen2VLImageProcessorPil", JUDGE)

    def judge(rows, images):
        seen = [(one.pixel_values, one.image_grid_thw) for one in (processor(x, return_tensors="pt") for x in images)]
        asked = [(k, question, answer) for k, row in enumerate(rows) for question, answer in row["vqa_list"]]
        found = [[] for _ in rows]
        for start in range(0, len(asked), AT_ONCE):
            places, questions, answers = zip(*asked[start:start + AT_ONCE])
            p = first_token(net, tokenizer, [seen[k] for k in places], questions)  # (questions, vocabulary)
            for k, question, answer, p_of in zip(places, questions, answers, p):
                first = [tokenizer(text).input_ids[0] for text in geneval2_answers(question, answer)]
                found[k].append(geneval2_probability(p_of, first))
        return [dict(value=float(np.mean(p)), probabilities=p) for p in found]
    return judge
