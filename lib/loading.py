"""Reading the parts of a diffusers folder, here or on the hub, so that what is missing or damaged is named."""

import contextlib
import functools
import glob
import os

import huggingface_hub
import torch
import transformers

transformers.logging.set_verbosity_error()  # it would warn of image processors that nothing here uses
import diffusers  # noqa: E402
from huggingface_hub.utils import httpx  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402

from lib.files import UserError  # noqa: E402

diffusers.utils.logging.set_verbosity_error()  # it would warn of each prompt that is too long
for library in (diffusers.utils, transformers):
    library.logging.disable_progress_bar()

# The safety checker replaces images by black ones, which has no place in training data or in a benchmark.
WITHOUT = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@contextlib.contextmanager
def naming(what):
    """Makes a sentence about `what` of the many things that the libraries raise where files are damaged."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what} cannot be loaded (safetensors only): {line}") from None


@functools.cache
def download(path):
    """The folder in the cache with the files of a hub id. Without a network one short question to the hub is enough:
    each of its own functions would try for half a minute."""
    online = not huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5) if online else None
    except httpx.HTTPError:
        online = False
    try:
        return diffusers.DiffusionPipeline.download(path, use_safetensors=True, local_files_only=not online, **WITHOUT)
    except (OSError, ValueError) as error:
        raise UserError(f"the hub says: {str(error).strip().splitlines()[0]}" if online else
                        f"the hub could not be reached, and the cache has no whole {path}.") from None


def load_part(folder, part, library, kind, dtype):
    """A part of a pipeline. Raises UserError, which names it, if it is not whole or is custom code."""
    if library not in ("diffusers", "transformers"):
        raise UserError(f"{folder}: its {part} is custom code in {library}.py, which is never run.")
    path, what = os.path.join(folder, part), f"{folder}: its {part}"
    with naming(what):
        if not os.path.isdir(path):
            raise FileNotFoundError("there is no such folder")
        kind = getattr(globals()[library], kind)
        if not issubclass(kind, torch.nn.Module):
            loaded = kind.from_pretrained(path)
            if "tokenizer" in part and loaded("a").input_ids == loaded("b").input_ids:
                raise UserError(f"{what} has no vocabulary.")
            return loaded
        loaded, info = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:  # which the libraries would fill with random numbers
        raise UserError(f"{what} lacks the weights {sorted(info['missing_keys'])[:3]}: its files are not whole.")
    return loaded


def stored_dtype(folder, part):
    """The precision of most of the weights in a part's first file, by its name in the format; None without a file."""
    files = sorted(glob.glob(os.path.join(glob.escape(folder), part, "*.safetensors")))
    if not files:
        return None  # load_part says so
    with naming(files[0]), safe_open(files[0], framework="pt") as file:
        dtypes = [file.get_slice(name).get_dtype() for name in file.keys()]
        return max(dtypes, key=dtypes.count)
