"""A chat model as a function, and what can be used of its answers (Sec. 4.3 and 4.4, perturb.py)."""

import json
import random
import re

from lib.files import UserError
from lib.prompts import WORDS

HEADER = "<|start_header_id|>"  # a template with this token is a whole chat of Llama 3, as the authors' templates are
EXAMPLE = "the new prompt"  # stands in our own instructions where the answer shall stand
VAGUE = "no text, because the prompt is too vague"  # a model may say so; it is not asked again
RUN = 8  # so many words in a row that an answer and the instruction share are no chance (guess)


def load_llm(name, instruction, device):
    """A chat model, as ask(prompts, seed) -> answers. Reads safetensors only, and runs no code of the model's own."""
    import torch
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
        llm = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, use_safetensors=True,
            trust_remote_code=False).to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"--llm {name} is no folder or hub id of a chat model that can be loaded (safetensors only; "
                        "without a network, from the cache). " + str(error).strip().split("\n")[0]) from None
    if HEADER in instruction and HEADER not in tokenizer.get_vocab():
        raise UserError(f"the template is a chat of Llama 3, but --llm {name} does not know its token {HEADER}.")
    if HEADER not in instruction and not tokenizer.chat_template:
        raise UserError(f"--llm {name} has no chat template: it was not made to follow instructions.")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama 3 has none

    def encode_chats(prompts):
        # "<|eot_id|>" in a prompt from the web must not end the message, and a model that can think aloud must not.
        if HEADER in instruction:
            end = f"\n<|eot_id|>\n{HEADER}assistant<|end_header_id|>\n"
            chats = [f"{instruction}\nprompt: {c.replace('<|', '< |')}{end}" for c in prompts]
            return tokenizer(chats, add_special_tokens=False, padding=True, return_tensors="pt")
        # The instruction is in the user's message, because some chat templates have no other.
        chats = [[dict(role="user", content=f"{instruction}\n\n{json.dumps(dict(prompt=c), ensure_ascii=False)}")]
                 for c in prompts]
        return tokenizer.apply_chat_template(chats, add_generation_prompt=True, enable_thinking=False, padding=True,
                                             sanitize_control_tokens=True, return_dict=True, return_tensors="pt")

    def ask(prompts, seed):
        torch.manual_seed(seed)
        tokens = encode_chats(prompts).to(device)  # (B, length)
        out = llm.generate(**tokens, do_sample=True, temperature=0.7, max_new_tokens=256,  # both: script
                           pad_token_id=tokenizer.pad_token_id)  # (B, length + length of the answers)
        return tokenizer.batch_decode(out[:, tokens["input_ids"].shape[1]:], skip_special_tokens=True)

    return ask


def words_of(text):
    """The words of a text in small letters, without a plural s, so that an apple is found in two apples."""
    words = re.findall(r"\w+", text.casefold()) if text.isascii() else WORDS.findall(text.casefold())  # 5 times as fast
    return [word.rstrip("s") or word for word in words]


FUNCTION_WORDS = set(words_of("a an the and or of in on at to by for from with as is are it its this that there"))


def why_unusable(c_minus, c, told, alignment):
    """Why a text cannot be c_minus of c, in words; None if it can. `told` are the words of the instruction."""
    said, words = words_of(c_minus), words_of(c)
    content, n = set(words) - FUNCTION_WORDS, min(RUN, len(said))
    runs = [said[i:i + n] for i in range(len(said) - n + 1)] if not set(said) <= set(words) else []
    if not said or "".join(c_minus.split()).casefold() == "".join(c.split()).casefold():
        return "empty or the same as c"
    if c_minus.encode(errors="replace").decode() != c_minus:  # JSON allows it, and no file can hold it
        return "half a character"
    repeated = [run for run in runs if f" {' '.join(run)} " in told and not set(run) <= set(words)]
    if repeated or EXAMPLE in c_minus.casefold():
        return "the instruction's own words"
    if len(c_minus) > 2 * len(c):
        return "longer than twice c"
    if alignment and content and not content & set(said):
        return "no content word of c"
    return None


def read_answer(answer, c, told="", alignment=False, seed=0):
    """c_minus from a chat model's answer: of the first JSON object in it that has {"prompt": a text} or {"neg_prompts":
    [texts]}. Of several usable texts one is drawn by (seed, c). `told` are the words of the instruction, with a space
    between. Raises ValueError, which says why, if no text is usable: VAGUE if the list is empty."""
    decoder, reason = json.JSONDecoder(), "not JSON"
    for brace in re.finditer("{", answer):
        try:
            found, _ = decoder.raw_decode(answer, brace.start())
        except (ValueError, RecursionError):  # RecursionError: thousands of braces
            continue
        texts, reason = [found["prompt"]] if "prompt" in found else found.get("neg_prompts"), 'not {"prompt": a text}'
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            break
    else:
        raise ValueError(reason)
    if not texts:
        raise ValueError(VAGUE)
    reasons = {text.strip(): why_unusable(text.strip(), c, told, alignment) for text in texts}
    usable = [text for text, reason in reasons.items() if not reason]
    if not usable:
        raise ValueError(next(iter(reasons.values())))
    return random.Random(f"{seed} {c}").choice(usable) if len(usable) > 1 else usable[0]
