"""The parts of a diffusers folder, here or on the hub: which files are read, and which are missing or damaged."""

import contextlib
import functools
import json
import os
import re
import shutil
import warnings

import diffusers
import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError, safe_open

from lib.files import UserError, read_json, write_file

LIBRARIES = dict(diffusers=diffusers, transformers=transformers)  # the classes of a pipeline's parts are theirs
transformers.logging.set_verbosity_error()  # it would warn of image processors that nothing here uses
diffusers.utils.logging.set_verbosity_error()  # it would warn of each prompt that is too long
transformers.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()

# The safety checker replaces images by black ones, which has no place in training data or in a benchmark.
WITHOUT = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
LORA = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
MEANINGS = {  # of what the libraries say of a folder here
    "We couldn't connect to": "its settings are no JSON object: copy or download the model again",
    "ignore_mismatched_sizes": "its weights do not fit its config.json",
    "header too large": "its weights are damaged, or a pointer of git-lfs: then git lfs pull brings the weights"}
VARIANT = r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors"  # in the name of a file with weights


@contextlib.contextmanager
def naming(what):
    """Makes a sentence about `what` of the many things that the libraries raise where files are damaged."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        line = lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]  # the layer that does not fit
        for sign, meaning in MEANINGS.items():
            line = meaning if sign in line else line
        raise UserError(f"{what} cannot be loaded (safetensors only): {line}") from None


@functools.cache
def download(path, variant):
    """The folder in the cache with the files of a hub id. Without a network one short question to the hub is enough:
    each of its own functions would try for half a minute."""
    if checkpoint := re.search(r"checkpoint-0*(\d+)\.pt$", path):
        raise UserError(f"the command that began this run, with --updates {checkpoint[1]}, makes a model of its newest "
                        "checkpoint, if that is this one.")
    if os.path.isfile(path):
        raise UserError("it is a file, not a folder; README.md has a command that makes a folder of a single file.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise UserError(f"there is no folder {path}.")
    online = not huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5) if online else None
    except httpx.HTTPError:
        online = False
    try:
        return diffusers.DiffusionPipeline.download(path, variant=variant, use_safetensors=True,
                                                    local_files_only=not online, **WITHOUT)
    except (OSError, ValueError) as error:
        # what diffusers itself says of the hub's errors speaks of a stack trace
        cause = error if isinstance(error, HfHubHTTPError) or not error.__cause__ else error.__cause__
        first, variants = str(cause).strip().splitlines()[0], re.findall(VARIANT, str(cause))
        if isinstance(cause, GatedRepoError):
            why = f"access to it is restricted: ask for it at https://huggingface.co/{path}, then hf auth login."
        elif isinstance(cause, RepositoryNotFoundError):
            why = "the hub has no such model, or it is private (hf auth login)."
        elif not online:
            why = f"the hub could not be reached, and the cache has no whole {path}."
        elif variants and not variant:
            why = f"it has only weights of the variant {variants[0]}: give {path}@{variants[0]}."
        else:
            why = f"the hub says: {first}"
        raise UserError(why) from None


def weight_files(folder, part, variant=None):
    """The paths of the files with a part's weights, as the libraries choose them: of the variant if there are such
    files, else the plain ones; the shards of an index, or one file. Files of other variants may lie beside them."""
    for infix in (f".{variant}", "") if variant else ("",):
        for stem in ("diffusion_pytorch_model", "model"):
            index = os.path.join(folder, part, f"{stem}.safetensors.index{infix}.json")
            plain = os.path.join(folder, part, f"{stem}{infix}.safetensors")
            if os.path.isfile(index):
                with naming(index):
                    names = set(read_json(index)["weight_map"].values())
                    return sorted(os.path.join(folder, part, name) for name in names)
            if os.path.isfile(plain):
                return [plain]
    return []


def load_part(folder, part, library, kind, dtype, variant=None):
    """A part of a pipeline. Raises UserError, which names it, if it is not whole, is another model's or custom code."""
    if library not in LIBRARIES:
        raise UserError(f"{folder}: its {part} is custom code in {library}.py, which is never run.")
    path, what = os.path.join(folder, part), f"{folder}: its {part}"
    with naming(what):
        if not os.path.isdir(path):
            raise FileNotFoundError("there is no such folder")
        kind = getattr(LIBRARIES[library], kind)
        if not issubclass(kind, torch.nn.Module):
            loaded = kind.from_pretrained(path)
            if "tokenizer" in part and loaded("a").input_ids == loaded("b").input_ids:
                raise UserError(f"{what} has no vocabulary.")
            return loaded
        files = [os.path.basename(file) for file in weight_files(folder, part, variant)]
        others = re.findall(VARIANT, " ".join(sorted(os.listdir(path))))
        if others and not files:
            raise UserError(f"{what} has only weights of the variant {others[0]}: give the model's name as "
                            f"NAME@{others[0]}.")
        variant = variant if f".{variant}" in "".join(files) else None
        loaded, info = kind.from_pretrained(path, dtype=dtype, variant=variant, use_safetensors=True,
                                            output_loading_info=True)
    if info["missing_keys"]:  # which the libraries would fill with random numbers
        raise UserError(f"{what} lacks the weights {sorted(info['missing_keys'])[:3]}: its files are not whole.")
    if part in ("unet", "transformer") and info["unexpected_keys"]:
        raise UserError(f"{what} has the weights {sorted(info['unexpected_keys'])[:3]}, which its config.json does not "
                        "have: they are of another model.")
    if not any(p.any() for p in loaded.parameters()):
        raise UserError(f"{what} has weights of 0 only.")
    return loaded


def copy_parts(folder, config, variant, without, target):
    """Copies a model's folder, byte for byte, but for the part `without`, the safety checker and weights that are not
    read; files of a variant get plain names. config is its model_index.json."""
    absent = {name: [None, None] if value is None else value for name, value in WITHOUT.items()}
    config = config | absent if "safety_checker" in config else config
    write_file(os.path.join(target, "model_index.json"), json.dumps(config, indent=2) + "\n")
    for part in [part for part, entry in config.items() if isinstance(entry, list) and entry[0] and part != without]:
        read = [os.path.basename(path) for path in weight_files(folder, part, variant)]
        infix = f".{variant}" if f".{variant}" in "".join(read) else ""
        index = f".safetensors.index{infix}.json"
        os.makedirs(os.path.join(target, part))
        for name in os.listdir(os.path.join(folder, part)):
            copy = os.path.join(target, part, name.replace(infix, ""))
            settings = name.endswith((".json", ".txt", ".model")) and ".index." not in name
            if name in read or settings or name.endswith(index):
                shutil.copyfile(os.path.join(folder, part, name), copy)
            if infix and name.endswith(index):  # it holds the names of the shards
                with open(copy, encoding="utf-8") as file:
                    write_file(copy, file.read().replace(infix, ""))


def stored_dtype(folder, part, variant=None):
    """The precision of most of a part's weights, by its name in the format; None without a file. Raises UserError for
    integers."""
    dtypes = []
    for path in weight_files(folder, part, variant):
        with naming(path), safe_open(path, framework="pt") as file:
            dtypes += [file.get_slice(name).get_dtype() for name in file.keys()]
    most = max(dtypes, key=dtypes.count, default=None)
    if most not in (None, "F64", "F32", "F16", "BF16"):
        raise UserError(f"{folder}: its {part} is stored in {most}: only models in floating point are read.")
    return most


def put_adapter(pipe, folder, name, flag=""):
    """Gives a pipeline the LoRA adapter in a folder, in any format that diffusers converts, under a name. Raises
    UserError unless all of its tensors are used and change something."""
    what, given = f"{flag}{folder} is no adapter for this model: ", dict(weight_name=LORA, use_safetensors=True)
    with naming(what + "it"), warnings.catch_warnings(action="ignore"):  # peft warns of several, which Eq. 6 needs
        unet = dict(unet_config=pipe.unet.config) if hasattr(pipe, "unet") else {}
        found = type(pipe).lora_state_dict(folder, **unet, **given)
        keys = [key for key in (found[0] if isinstance(found, tuple) else found) if not key.endswith("alpha")]
        parts = {part: net for part, net in pipe.components.items() if isinstance(net, torch.nn.Module)}
        layers = {f"{part}.{layer}" for part, net in parts.items() for layer, _ in net.named_modules()}
        unused = [key for key in keys if key.split(".")[0] not in parts or ".lora" in key
                  and not key.startswith("text_encoder") and key.split(".lora")[0] not in layers]
        if keys and not unused:
            pipe.load_lora_weights(folder, adapter_name=name, **given)
            used = {key: x for net in parts.values() for key, x in net.named_parameters() if f".{name}." in key}
            of_text = [key for key in keys if key.startswith("text_encoder")]  # whose layers have several names
            unused = of_text or keys if len(used) != len(keys) else []
    if unused or not keys:
        raise UserError(f"{what}{len(unused)} of its {len(keys)} tensors are for no layer of it: "
                        f"{', '.join(unused[:3])}")
    up = [x for key, x in used.items() if ".lora_B." in key]
    if up and not any(x.any() for x in up):
        raise UserError(f"{what}all of its lora_B are 0, so that it changes nothing.")


def replace_unet(model, name):
    """Puts in a U-Net that is published alone: a hub id or a folder, with or without a subfolder `unet`."""
    files = ["config.json", "diffusion_pytorch_model*.safetensors*"]
    with naming(f"--unet {name}"):
        folder = name if os.path.isdir(name) else huggingface_hub.snapshot_download(
            name, allow_patterns=[*files, *["unet/" + file for file in files], "scheduler/*.json"])
        inside = os.path.join(folder, "unet")
        path = inside if os.path.isdir(inside) else os.path.abspath(folder)
        net = load_part(*os.path.split(path), "diffusers", "UNet2DConditionModel", model.dtype)
        scheduler = os.path.join(os.path.dirname(path), "scheduler", "scheduler_config.json")
        predicts = read_json(scheduler).get("prediction_type", "epsilon") if os.path.isfile(scheduler) else None
    kinds = [(key, net.config[key], model.net.config.get(key))
             for key in ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type")]
    for key, found, wanted in [*kinds, ("prediction_type", predicts or model.prediction_type, model.prediction_type)]:
        if found != wanted:
            raise UserError(f"--unet {name} is of another kind than the model: its {key} is {found}, not {wanted}.")
    model.net = model.pipe.unet = net.to(model.device)
    model.unet_files = weight_files(*os.path.split(path))
