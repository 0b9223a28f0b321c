"""The parts of a diffusers folder, here or on the hub: which files are read, and which are missing or damaged."""

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
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from safetensors import safe_open

from lib.files import UserError, read_json, read_text, reading, write_file

LIBRARIES = dict(diffusers=diffusers, transformers=transformers)  # the classes of a pipeline's parts are theirs
for library in LIBRARIES.values():
    library.utils.logging.set_verbosity_error()  # they would warn of image processors and of each prompt too long
    library.utils.logging.disable_progress_bar()

# Without the safety checker, which replaces images by black ones, and without marks in SDXL's images: neither has a
# place in training data or in a benchmark.
WITHOUT = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False, add_watermarker=False)
LORA = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
VARIANT = r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors"  # in the name of a file with weights
AGAIN = "copy or download it again, with weights as .safetensors (git lfs pull, where they are pointers of git-lfs)."


@functools.cache
def download(path, variant, what):
    """The folder in the cache with the files of a hub id. Raises UserError, which begins with `what` and says why there
    is none."""
    inside = [os.path.join(path, result) for result in ("pipeline", "lora")]
    if checkpoint := re.search(r"checkpoint-0*(\d+)\.pt$", path):
        raise UserError(f"{what}: the command that began this run, with --updates {checkpoint[1]}, makes a model of "
                        "its newest checkpoint, if that is this one.")
    if os.path.isfile(path):
        raise UserError(f"{what}: README.md has a command that makes a folder of a single file.")
    if os.path.isdir(path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        instead = "".join([f": give {result}" for result in inside if os.path.isdir(result)][:1])
        raise UserError(f"{what}: there is no {os.path.join(path, 'model_index.json')}{instead}")
    try:  # one short question, because each of the hub's own functions would try for half a minute
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        online = True
    except (httpx.HTTPError, OfflineModeIsEnabled):
        online = False
    try:
        return diffusers.DiffusionPipeline.download(path, variant=variant, use_safetensors=True,
                                                    local_files_only=not online, **WITHOUT)
    except (OSError, ValueError) as error:
        # diffusers' own words speak of a stack trace
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        variants = re.findall(VARIANT, str(cause))
        if isinstance(cause, GatedRepoError):
            why = f"access to it is restricted: ask for it at https://huggingface.co/{path}, then hf auth login."
        elif isinstance(cause, RepositoryNotFoundError):
            why = "the hub has no such model, or it is private (hf auth login)."
        elif not online:
            why = f"the hub could not be reached, and the cache has no whole {path}."
        elif variants and not variant:
            why = f"it has only weights of the variant {variants[0]}: give {path}@{variants[0]}."
        else:
            why = f"the hub says: {str(cause).strip().splitlines()[0]}"
        raise UserError(f"{what}: {why}") from None


def weight_files(folder, part, variant=None):
    """The paths of the files with a part's weights, as the libraries choose them, and their variant: the one that is
    asked for if there are such files, else None, the plain ones. They are the shards of an index, or one file."""
    for found in (variant, None):
        infix = f".{found}" if found else ""
        for stem in ("diffusion_pytorch_model", "model"):
            index = os.path.join(folder, part, f"{stem}.safetensors.index{infix}.json")
            plain = os.path.join(folder, part, f"{stem}{infix}.safetensors")
            if os.path.isfile(index):
                with reading(index, AGAIN), open(index, encoding="utf-8") as file:
                    names = set(json.load(file)["weight_map"].values())
                    return sorted(os.path.join(folder, part, name) for name in names), found
            if os.path.isfile(plain):
                return [plain], found
    return [], None


def load_part(folder, part, library, kind, dtype, variant=None):
    """A part of a pipeline; a network has the paths of its weights in `files`. Raises UserError, which names the part,
    if it is not whole, is another model's or custom code."""
    path, what = os.path.join(folder, part), f"{folder}: its {part}"
    if library not in LIBRARIES:
        raise UserError(f"{what} is custom code in {library}.py, which is never run.")
    with reading(what, AGAIN):
        kind, names = getattr(LIBRARIES[library], kind), sorted(os.listdir(path))
        for name in names:
            if name.endswith("config.json"):  # of damaged ones diffusers would say that it could not connect
                json.loads(read_text(os.path.join(path, name))).keys()
        if not issubclass(kind, torch.nn.Module):
            loaded = kind.from_pretrained(path)
            if "tokenizer" in part and loaded("a").input_ids == loaded("b").input_ids:
                raise UserError(f"{what} has no vocabulary.")
            return loaded
        files, found = weight_files(folder, part, variant)
        others = re.findall(VARIANT, " ".join(names))
        if others and not files:
            raise UserError(f"{what} has only weights of the variant {others[0]}: give NAME@{others[0]}.")
        net, info = kind.from_pretrained(path, dtype=dtype, variant=found, use_safetensors=True,
                                         ignore_mismatched_sizes=True, output_loading_info=True)
    # the libraries would fill what is missing with random numbers and ignore what is too much
    odd = {*info["missing_keys"], *[key for key, *_ in info["mismatched_keys"]]}
    if part in ("unet", "transformer"):
        odd |= {*info["unexpected_keys"]}
        if not isinstance(net.config.sample_size, int):
            raise UserError(f"{what} has the sample_size {net.config.sample_size}: only square images are supported.")
    if odd:
        raise UserError(f"{what} has a config.json that does not fit its weights {sorted(odd)[:3]}: its files are not "
                        "whole, or of another model.")
    if not any(p.any() for p in net.parameters()):
        raise UserError(f"{what} has weights of 0 only.")
    net.files = files
    return net


def copy_parts(folder, config, variant, without, target):
    """Copies a model's folder, byte for byte, but for the part `without`, the safety checker and weights that are not
    read; files of a variant get plain names. config is its model_index.json."""
    if "safety_checker" in config:
        config = config | dict.fromkeys(("safety_checker", "feature_extractor"), [None, None])
        config["requires_safety_checker"] = False
    write_file(os.path.join(target, "model_index.json"), json.dumps(config, indent=2) + "\n")
    for part in [part for part, entry in config.items() if isinstance(entry, list) and entry[0] and part != without]:
        files, found = weight_files(folder, part, variant)
        infix = f".{found}" if found else ""
        os.makedirs(os.path.join(target, part))
        for name in os.listdir(os.path.join(folder, part)):
            source, copy = os.path.join(folder, part, name), os.path.join(target, part, name.replace(infix, ""))
            if name.endswith(f".safetensors.index{infix}.json"):  # it holds the names of the shards
                write_file(copy, read_text(source).replace(infix, ""))
            elif source in files or name.endswith((".json", ".txt", ".model")) and ".index." not in name:
                shutil.copyfile(source, copy)


def stored_dtype(folder, part, variant=None):
    """The precision of most of a part's weights, by its name in the format; None without a file. Raises UserError for
    integers."""
    dtypes = []
    for path in weight_files(folder, part, variant)[0]:
        with reading(path, AGAIN), safe_open(path, framework="pt") as file:
            dtypes += [file.get_slice(name).get_dtype() for name in file.keys()]
    most = max(dtypes, key=dtypes.count, default=None)
    if most not in (None, "F64", "F32", "F16", "BF16"):
        raise UserError(f"{folder}: its {part} is stored in {most}: only models in floating point are read.")
    return most


def put_adapter(pipe, folder, name, flag=""):
    """Gives a pipeline the LoRA adapter in a folder, in any format that diffusers converts, under a name. Raises
    UserError unless all of its tensors are used and change something."""
    what, given = f"{flag}{folder} is no adapter for this model", dict(weight_name=LORA, use_safetensors=True)
    parts = {part: net for part, net in pipe.components.items() if isinstance(net, torch.nn.Module)}
    layers = {f"{part}.{layer}" for part, net in parts.items() for layer, _ in net.named_modules()}
    with reading(f"{flag}{folder}", "it is no adapter for this model."), warnings.catch_warnings(action="ignore"):
        net = parts.get("unet") or parts["transformer"]
        found, *_ = type(pipe).lora_state_dict(folder, unet_config=net.config, return_lora_metadata=True, **given)
        keys = [key.replace("text_model.", "") for key in found if not key.endswith("alpha")]
        unused = [key for key in keys if key.split(".")[0] not in parts
                  or ".lora" in key and key.split(".lora")[0] not in layers]
        if keys and not unused:
            pipe.load_lora_weights(folder, adapter_name=name, **given)  # peft warns of several, which Eq. 6 needs
            used = {key: x for net in parts.values() for key, x in net.named_parameters() if f".{name}." in key}
            unused = keys if len(used) != len(keys) else []
    if unused or not keys:
        raise UserError(f"{what}: {len(unused)} of its {len(keys)} tensors are for no layer of it: "
                        f"{', '.join(unused[:3])}")
    if not any(x.any() for key, x in used.items() if ".lora_B." in key):
        raise UserError(f"{what}: all of its lora_B are 0, so that it changes nothing.")


def replace_unet(model, name):
    """Puts in a U-Net that is published alone: a hub id or a folder, with or without a subfolder `unet`."""
    files = ["config.json", "diffusion_pytorch_model*.safetensors*"]
    with reading(f"--unet {name}", AGAIN):
        folder = name if os.path.isdir(name) else huggingface_hub.snapshot_download(
            name, allow_patterns=[*files, *["unet/" + file for file in files], "scheduler/*.json"])
        inside = os.path.join(folder, "unet")
        path = inside if os.path.isdir(inside) else os.path.abspath(folder)
        net = load_part(*os.path.split(path), "diffusers", "UNet2DConditionModel", model.dtype)
        scheduler = os.path.join(os.path.dirname(path), "scheduler", "scheduler_config.json")
        predicts = read_json(scheduler).get("prediction_type", "epsilon") if os.path.isfile(scheduler) else None
    found = dict(net.config, prediction_type=predicts or model.prediction_type)
    wanted = dict(model.net.config, prediction_type=model.prediction_type)
    for key in ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "prediction_type"):
        if found[key] != wanted.get(key):
            raise UserError(f"--unet {name} is of another kind than the model: its {key} is {found[key]}, not "
                            f"{wanted.get(key)}.")
    model.net = model.pipe.unet = net.to(model.device)
