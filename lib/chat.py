"""A chat model as a function, and what can be used of its answers (Sec. 4.3 and 4.4, perturb.py)."""

import json
import random
import re

from lib.files import UserError, reading
from lib.prompts import WORDS

HEADER = "<|start_header_id|>"  # a template with this token is a whole chat of Llama 3, as the authors' templates are
EXAMPLE = "the new prompt"  # stands in our own instructions where the answer shall stand
VAGUE = "no text, because the prompt is too vague"  # a model may say so; it is not asked again
RUN = 8  # so many words in a row that an answer and the instruction share are no chance (guess)
BRACES, DECODE = re.compile("{").finditer, json.JSONDecoder().raw_decode


def load_llm(name, instruction, device):
    """A chat model, as ask(prompts, seed) -> answers. Reads safetensors only, and runs no code of the model's own."""
    import torch
    import transformers

    with reading(f"--llm {name}", "it must be a chat model's folder or hub id, with safetensors."):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
        llm = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, use_safetensors=True,
            trust_remote_code=False)
    whole_chat = HEADER in instruction
    if whole_chat and HEADER not in tokenizer.get_vocab():
        raise UserError(f"the template is a chat of Llama 3, but --llm {name} does not know its token {HEADER}.")
    if not whole_chat and not tokenizer.chat_template:
        raise UserError(f"--llm {name} has no chat template: it was not made to follow instructions.")
    llm.to(device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama 3 has none

    def ask(prompts, seed):
        torch.manual_seed(seed)
        # "<|eot_id|>" in a prompt from the web must not end the message, and no model is to think aloud.
        if whole_chat:
            end = f"\n<|eot_id|>\n{HEADER}assistant<|end_header_id|>\n"
            chats = [f"{instruction}\nprompt: {c.replace('<|', '< |')}{end}" for c in prompts]
            tokens = tokenizer(chats, add_special_tokens=False, padding=True, return_tensors="pt")
        else:  # the instruction is in the user's message, because some chat templates have no other
            chats = [[dict(role="user", content=f"{instruction}\n\n{json.dumps(dict(prompt=c), ensure_ascii=False)}")]
                     for c in prompts]
            tokens = tokenizer.apply_chat_template(chats, add_generation_prompt=True, sanitize_control_tokens=True,
                                                   enable_thinking=False, padding=True, return_dict=True,
                                                   return_tensors="pt")
        out = llm.generate(**tokens.to(device), do_sample=True, temperature=0.7, max_new_tokens=256,  # both: script
                           pad_token_id=tokenizer.pad_token_id)  # (B, length + length of the answers)
        return tokenizer.batch_decode(out[:, tokens["input_ids"].shape[1]:], skip_special_tokens=True)

    return ask


ASCII_WORDS = bytes(ord(chr(i).lower()) if chr(i).isalnum() or chr(i) == "_" else ord(" ") for i in range(256))


def words_of(text):
    """The words of a text in small letters and without s at their ends, so that an apple is found in two apples."""
    words = (text.encode().translate(ASCII_WORDS).decode().split() if text.isascii()  # four times as fast
             else WORDS.findall(text.casefold()))
    return [word.rstrip("s") or word for word in words]


FUNCTION_WORDS = set(words_of("a an the and or of in on at to by for from with as is are it its this that there"))


def why_unusable(c_minus, c, told, alignment):
    """Why a text cannot be c_minus of c, in words; None if it can. `told` are the instruction's words."""
    said = words_of(c_minus)
    same_end = c_minus[-1:].casefold() == c.rstrip()[-1:].casefold()  # most answers end otherwise than c, and so differ
    if not said or same_end and "".join(c_minus.split()).casefold() == "".join(c.split()).casefold():
        return "empty or the same as c"
    if not c_minus.isascii() and c_minus.encode(errors="replace").decode() != c_minus:  # no file can hold it
        return "half a character"
    n, repeated = min(RUN, len(said)), ()
    if len(said) >= 2 * n or f" {said[n - 1]} " in told:  # if there are fewer, every run holds the n-th
        repeated = [said[i:i + n] for i in range(len(said) - n + 1) if f" {' '.join(said[i:i + n])} " in told]
    if EXAMPLE in c_minus.casefold() or any(not set(run) <= set(words_of(c)) for run in repeated):
        return "the instruction's own words"
    if len(c_minus) > 2 * len(c):
        return "longer than twice c"
    c_words = f" {c.casefold()} "  # a content word of most answers stands in it
    if alignment and not any(f" {word} " in c_words for word in said if word not in FUNCTION_WORDS):
        content = set(words_of(c)) - FUNCTION_WORDS
        return "no content word of c" if content and content.isdisjoint(said) else None


def read_answer(answer, c, told="", alignment=False, seed=0):
    """dict(c_minus) from a chat model's answer, or dict(answer, reason) if no text is usable. It reads the first JSON
    object that has {"prompt": a text} or {"neg_prompts": [texts]}, and draws one of several usable texts by (seed, c).
    `told` are the instruction's words, with a space around each."""
    texts, reason, usable = (), "not JSON", []
    for brace in BRACES(answer):
        try:
            found, _ = DECODE(answer, brace.start())
        except (ValueError, RecursionError):  # RecursionError: thousands of braces
            continue
        given, reason = [found["prompt"]] if "prompt" in found else found.get("neg_prompts"), 'not {"prompt": a text}'
        if isinstance(given, list) and set(map(type, given)) <= {str}:
            texts, reason = given, VAGUE
            break
    for text in dict.fromkeys(map(str.strip, texts)):
        reason = why_unusable(text, c, told, alignment)
        if not reason:
            usable.append(text)
    if not usable:
        return dict(answer=answer, reason=reason)
    return dict(c_minus=random.Random(f"{seed} {c}").choice(usable) if len(usable) > 1 else usable[0])
