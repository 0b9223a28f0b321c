"""T2I-CompBench's rules against its own code's answers, and BLIP on small random networks."""

import numpy as np
import pytest
import tiny_judges
import torch

from judges import compbench, shared
from lib.files import UserError


def test_compbench_spatial_scores_are_the_official_ones():
    for case in tiny_judges.golden("compbench_spatial_cases.jsonl"):
        if case["kind"] == "scene":
            assert compbench.compbench_spatial_score(case["prompt"], case["nouns"], case["objects"]) == case["official_score"]
        else:
            assert compbench.compbench_position(case["locality"], case["a"], case["b"]) == case["official_score"]
    assert compbench.compbench_spatial_score("running", [], []) == 0.0
    assert shared.overlap([1, 1, 1, 1], [1, 1, 1, 1]) == 0.0


def test_blip_products_and_phrases_are_the_official_ones():
    case, scores = tiny_judges.golden("compbench_blipvqa_case.json"), []
    for image in case["images"]:
        phrases = compbench.compbench_phrases(case["prompts"][image["file"].split("_")[0]])
        asked = [(question, float(answer)) for question, answer in image["asked"] if question]
        assert [f"{phrase}?" for phrase in phrases] == [question for question, _ in asked]
        scores.append(compbench.compbench_product([answer for _, answer in asked]))
        assert f"{scores[-1]:.4f}" == image["official"]
    assert np.mean(scores) == pytest.approx(case["official_average"], abs=1e-12)
    assert compbench.compbench_question("The (red) Cat; 10% #off.") == "the red cat 10% off?"
    assert compbench.compbench_question("A") == "a?" and compbench.compbench_question("w " * 60).count("w") == 50


def test_three_in_one_is_the_official_one():
    case = tiny_judges.golden("compbench_3in1_case.json")
    spatial, action = ({compbench.plainly(prompt) for prompt in case[key]} for key in ("spatial_list", "action_list"))
    for i, official in enumerate(case["official"]):
        prompt = compbench.plainly(case["prompts"][i // 10])
        kind = "spatial" if prompt in spatial else "action" if prompt in action else "all"
        assert compbench.three_in_one(kind, case["attribute"][i], case["spatial"][i], case["action"][i]) == official


def test_blips_own_weights_give_the_same_blip():
    net, theirs = tiny_judges.blip()
    assert "visual_encoder.blocks.1.attn.proj.weight" in theirs
    mine = compbench.blip_from_salesforce(theirs)
    assert mine.keys() == net.state_dict().keys()
    assert all(torch.equal(x, mine[name]) for name, x in net.state_dict().items())
    assert compbench.BLIP_CONFIG["text_config"]["num_attention_heads"] == 12  # BERT's; transformers' default is 8
    assert compbench.BLIP_CONFIG["vision_config"] == dict(image_size=480, layer_norm_eps=1e-6)  # not 384, not 1e-5


def test_blip_is_asked_with_enc_and_without_padding():
    net, _ = tiny_judges.blip()
    states = net.vision_model(torch.randn(3, 3, 32, 32, generator=torch.manual_seed(5))).last_hidden_state
    ids = torch.tensor([[101, 1000, 1003, 102]])
    together = compbench.blip_yes(net, states, ids)
    assert together == pytest.approx([compbench.blip_yes(net, states[k:k + 1], ids)[0] for k in range(3)], abs=1e-6)
    assert len({round(p, 5) for p in together}) == 3 and all(0 < p < 1 for p in together)
    assert compbench.blip_yes(net, states, torch.tensor([[7, 1000, 1003, 102]])) == together  # the first becomes [ENC]
    assert compbench.blip_yes(net, states, torch.tensor([[101, 1001, 1003, 102]])) != together
    question = net.text_encoder(input_ids=torch.tensor([[30523, 1000, 1003, 102]]), encoder_hidden_states=states[:1]).last_hidden_state
    logits = net.text_decoder(input_ids=torch.tensor([[30522]]), encoder_hidden_states=question).logits[0, 0]
    assert together[0] == pytest.approx(torch.sigmoid(logits[2748] - logits[2053]).item(), abs=1e-6)  # bert's yes and no


def test_official_results_are_read_by_the_numbers_of_the_images_once_both_categories_are_there(tmp_path):
    for category in ("spatial", "complex"):
        assert compbench.official_spatial(str(tmp_path)) == {}
        folder = tmp_path / "compbench" / category
        (folder / "samples").mkdir(parents=True)
        for k in (0, 1, 123):
            (folder / "samples" / f"a [dog] 7_{k:06d}.png").write_bytes(b"")
        (folder / "labels" / "annotation_obj_detection_2d").mkdir(parents=True)
        (folder / "labels" / "annotation_obj_detection_2d" / "vqa_result.json").write_text(
            '[{"question_id": 123, "answer": 0.5}, {"question_id": 1, "answer": 1}, {"question_id": 0, "answer": 0.0}]')
    found = compbench.official_spatial(str(tmp_path))
    path = "compbench/complex/samples/a [dog] 7_000123.png"
    assert len(found) == 6 and found[path] == dict(path=path, group="complex", index=12, value=0.5)
    assert found["compbench/spatial/samples/a [dog] 7_000001.png"]["value"] == 1


@pytest.mark.parametrize("text, message", [
    ("{", "cannot be read"), ("5", "not iterable"), ("[1]", "not subscriptable"), ('[{"question_id": 0}]', "'answer'"),
    ('[{"question_id": 0, "answer": "x"}]', "could not convert string to float"), ('[{"question_id": 0, "answer": NaN}]', "1 answers to 1 images, or one that is not from 0 to 1"),
    ('[{"question_id": 0, "answer": 3}]', "1 answers to 1 images, or one that is not from 0 to 1"), ('[{"question_id": 1, "answer": 1}]', "run the official script again")])
def test_official_results_of_another_kind_end_in_a_sentence(text, message, tmp_path):
    for category in ("spatial", "complex"):
        labels = tmp_path / "compbench" / category / "labels" / "annotation_obj_detection_2d"
        labels.mkdir(parents=True)
        (labels / "vqa_result.json").write_text(text)
        (tmp_path / "compbench" / category / "samples").mkdir()
        (tmp_path / "compbench" / category / "samples" / "a dog_000000.png").write_bytes(b"")
    with pytest.raises(UserError, match=f"vqa_result.json .*{message}"):
        compbench.official_spatial(str(tmp_path))
