"""The parts of a diffusers folder, here or on the hub: which files are read, and which are missing or damaged."""

import functools
import glob
import json
import os
import re
import shutil
import warnings

import diffusers
import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from safetensors import safe_open

from lib.files import UserError, read_json, read_text, reading, write_file

LIBRARIES = dict(diffusers=diffusers, transformers=transformers)  # the classes of a pipeline's parts are theirs
for library in LIBRARIES.values():
    library.utils.logging.set_verbosity_error()  # they would warn of image processors and of each prompt too long
    library.utils.logging.disable_progress_bar()

# The safety checker makes images black and the watermarker marks them, which neither training nor benchmarks allow.
WITHOUT = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False, add_watermarker=False)
LORA = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
VARIANT = r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors"  # in the name of a file with weights
AGAIN = "copy or download it again, with weights as .safetensors (git lfs pull, where they are pointers of git-lfs)."


@functools.cache
def download(path, variant, what):
    """The folder in the cache with the files of a hub id, or a UserError that begins with `what` and says why not."""
    if checkpoint := re.search(r"checkpoint-0*(\d+)\.pt$", path):
        raise UserError(f"{what}: the command that began this run, with --updates {checkpoint[1]}, makes a model of "
                        "this checkpoint, if it is the newest.")
    if os.path.isfile(path):
        raise UserError(f"{what}: README.md has a command that makes a folder of a single file.")
    for result in ("pipeline", "lora"):  # in the folder of a run
        if os.path.isdir(os.path.join(path, result)):
            raise UserError(f"{what}: give {os.path.join(path, result)}.")
    if os.path.isdir(path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
        raise UserError(f"{what}: there is no {os.path.join(path, 'model_index.json')}.")
    try:  # one short question, because the hub's own functions wait for minutes where nothing answers
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        online = True
    except (httpx.HTTPError, OfflineModeIsEnabled):
        online = False
    try:
        return diffusers.DiffusionPipeline.download(path, variant=variant, use_safetensors=True,
                                                    local_files_only=not online, **WITHOUT)
    except (OSError, ValueError) as error:
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error  # not diffusers' own words
        said, variants = " ".join(str(cause).split("\n\n", 1)[-1].split()), re.findall(VARIANT, str(cause))
        why = f"the hub says: {said} (a private or restricted model needs hf auth login)"
        if not online:
            why = f"the hub could not be reached, and the cache has no whole {path}."
        elif variants and not variant:
            why = f"it has only weights of the variant {variants[0]}: give {path}@{variants[0]}."
        raise UserError(f"{what}: {why}") from None


def weight_files(folder, part, variant=None):
    """The paths of a part's weights and their variant: the one asked for where it is there, else None. Where there is
    an index, they are the shards that it names, whatever else lies beside them."""
    where = os.path.join(folder, part, "")
    for found in (variant, None):
        infix = f".{found}" if found else ""
        names = [f"diffusion_pytorch_model{infix}.safetensors", f"model{infix}.safetensors"]
        for index in glob.glob(f"{glob.escape(where)}*.safetensors.index{infix}.json"):
            with reading(index, AGAIN):
                names = {*read_json(index)["weight_map"].values()}
        if files := [where + name for name in sorted(names) if os.path.isfile(where + name)]:
            return files, found
    return [], None


def load_part(folder, part, library, kind, dtype, variant=None):
    """A part of a pipeline, a network with the paths of its weights as `files`; or a UserError that names the part."""
    path, what = os.path.join(folder, part), f"{folder}: its {part}"
    if library not in LIBRARIES:
        raise UserError(f"{what} is custom code in {library}.py, which is never run.")
    with reading(what, AGAIN):
        kind, names = getattr(LIBRARIES[library], kind), sorted(os.listdir(path))
        if not issubclass(kind, torch.nn.Module):
            loaded = kind.from_pretrained(path)
            if "tokenizer" in part and loaded("a").input_ids == loaded("b").input_ids:
                raise UserError(f"{what} has no vocabulary.")
            return loaded
        files, found = weight_files(folder, part, variant)
        others = re.findall(VARIANT, " ".join(names))
        if others and not files:
            raise UserError(f"{what} has only weights of the variant {others[0]}: give NAME@{others[0]}.")
        if part in ("unet", "transformer") and not isinstance(size := kind.load_config(path).get("sample_size"), int):
            raise UserError(f"{what} has the sample_size {size}: only square images are supported.")
        net, info = kind.from_pretrained(path, dtype=dtype, variant=found, use_safetensors=True,
                                         ignore_mismatched_sizes=True, output_loading_info=True)
    # the libraries would fill what is missing with random numbers and ignore what is too much
    odd = {*info["missing_keys"], *[key for key, *_ in info["mismatched_keys"]]}
    if library == "diffusers" and part != "vae":
        odd |= {*info["unexpected_keys"]}
        stored_dtype(folder, part, found)  # raises for integers
    if odd:
        raise UserError(f"{what} is not whole, or of another model: its config.json does not fit {sorted(odd)[:3]}.")
    if not any(p.any() for p in net.parameters()):
        raise UserError(f"{what} has weights of 0 only.")
    net.files = files
    return net


def copy_parts(folder, config, variant, without, target):
    """Copies a model's folder as it is, but for the part `without` and what is not read; variants get plain names."""
    absent = dict(safety_checker=[None, None], feature_extractor=[None, None], requires_safety_checker=False)
    config = config | absent if "safety_checker" in config else config
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
    """The precision of most of a part's weights, as its files name it, or None. Raises UserError for integers."""
    dtypes = []
    for path in weight_files(folder, part, variant)[0]:
        with reading(path, AGAIN), safe_open(path, framework="pt") as file:
            dtypes += [file.get_slice(name).get_dtype() for name in file.keys()]
    most = max(dtypes, key=dtypes.count, default=None)
    if most not in (None, "F64", "F32", "F16", "BF16"):
        raise UserError(f"{folder}: its {part} is stored in {most}: only models in floating point are read.")
    return most


def put_adapter(model, net, folder, name, flag=""):
    """Gives a network of a model the LoRA adapter in a folder, in any format that diffusers converts, under a name.
    Raises UserError unless all of its tensors are used and change something."""
    prefix, path = f"{model.net_name}.", os.path.join(folder, LORA)
    advice = "it is no adapter for this model (or a pointer of git-lfs: git lfs pull)."
    with reading(f"{flag}{folder}", advice), warnings.catch_warnings(action="ignore"), safe_open(path, "pt") as file:
        if any("dora_scale" in key for key in file.keys()):  # diffusers would leave them out in silence
            raise ValueError("it is a DoRA, with dora_scale")
        weights, *alphas, metadata = type(model.pipe).lora_state_dict(
            folder, weight_name=LORA, use_safetensors=True, unet_config=net.config, return_lora_metadata=True)
        layers, keys = dict(net.named_modules()), [key for key in weights if not key.endswith("alpha")]
        unused = [key for key in keys if not key.startswith(prefix)
                  or ".lora" in key and key.removeprefix(prefix).split(".lora")[0] not in layers]
        if keys and not unused:  # peft warns of several adapters, which Eq. 6 needs
            net.load_lora_adapter(weights, prefix=model.net_name, adapter_name=name, metadata=metadata,
                                  network_alphas=alphas[0] if alphas else None, low_cpu_mem_usage=True)
            used = {key.replace(f".{name}.", "."): x for key, x in net.named_parameters() if f".{name}." in key}
            if any(x.is_meta for x in used.values()):
                raise ValueError("some of its layers have not both a lora_A and a lora_B")
            unused = [key for key in keys if key.removeprefix(prefix) not in used] if len(used) != len(keys) else []
        if unused or not keys:
            raise ValueError(f"{len(unused)} of its {len(keys)} tensors are for no layer: {', '.join(unused[:3])}")
        if not 0 < sum(x.norm().item() for key, x in used.items() if ".lora_B." in key) < float("inf"):
            raise ValueError("its lora_B are all 0, so that it changes nothing, or not finite")


def replace_unet(model, name):
    """Puts in a U-Net that is published alone: a hub id or a folder, with or without a subfolder `unet`."""
    weights = "diffusion_pytorch_model*.safetensors*"
    with reading(f"--unet {name}", "it must be a U-Net of the model's kind, with weights as .safetensors."):
        folder = name if os.path.isdir(name) else huggingface_hub.snapshot_download(
            name, allow_patterns=["*config.json", weights, "unet/" + weights])
        inside = os.path.join(folder, "unet")
        path = inside if os.path.isdir(inside) else os.path.abspath(folder)
        net = load_part(*os.path.split(path), "diffusers", "UNet2DConditionModel", model.dtype)
        scheduler = os.path.join(os.path.dirname(path), "scheduler", "scheduler_config.json")
        predicts = read_json(scheduler).get("prediction_type", "epsilon") if os.path.isfile(scheduler) else None
        found = dict(net.config, prediction_type=predicts or model.prediction_type)
        wanted = dict(model.net.config, prediction_type=model.prediction_type)
        for key in ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "prediction_type"):
            if found[key] != wanted.get(key):
                raise ValueError(f"its {key} is {found[key]}, not {wanted.get(key)}")
    model.net = model.pipe.unet = net.to(model.device)
