"""What has nothing to do with the method: how a program ends, its flags, and its processes."""

import argparse
import contextlib
import datetime
import functools
import io
import os
import sys

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lib.files import UserError


def program(main):
    """Ends main with a sentence where the user can put it right; a bug keeps its traceback."""
    @functools.wraps(main)
    def run(argv=None):
        sys.stdout = sys.stdout or open(os.devnull, "w")  # closed by >&-
        sys.stderr = sys.stderr or open(os.devnull, "w")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
        try:
            if "" in (sys.argv[1:] if argv is None else argv):  # as of "$NAME" where NAME is not set
                raise UserError("an argument is '': give a name in its place, or leave it out with its flag.")
            result = main(argv)
            sys.stdout.flush()
            return result
        except UserError as error:
            message = str(error)
        except torch.OutOfMemoryError as error:
            message = ("out of memory: give a smaller --batch-size (perturb.py: and another OUT), or to train.py a "
                       f"smaller --micro-batch, --checkpointing or --lora-rank. {error}")
        except (KeyboardInterrupt, BrokenPipeError) as error:
            if isinstance(error, BrokenPipeError):  # or Python's own last flush fails too
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            message = "stopped. The same command goes on from what was written, or begins anew where nothing was."
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            message = f"{error.filename} is a file where a folder is needed, or a folder where a file is: move it away."
        except (OSError, SafetensorError) as error:
            message = f"cannot read or write: {error}. What was written before is kept: run the same command again."
        sys.exit(message)  # by now the error is gone, and with it the progress bar, which has ended its line
    return run


# ---- flags


def at_least(low, kind=int, high=sys.float_info.max):
    """An argparse type: a number from `low` to `high`."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            bound = f"{high:g} or less" if value > high else f"{low:g} or more"
            raise argparse.ArgumentTypeError(f"must be {bound}, not {text}")
        return value
    return number


def given_flags(parser, argv):
    """The names of the arguments that stand on the command line; the others have their defaults."""
    empty = argparse.Namespace(**{action.dest: None for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(argv, empty)).items() if value is not None}


# ---- processes


@contextlib.contextmanager
def holding(folder):
    """Makes a folder and holds it for this process alone; a folder into which nothing was written goes again. Raises
    UserError if another process holds it."""
    lock = FileLock(os.path.join(folder, ".lock"), timeout=0)
    try:
        os.makedirs(folder, exist_ok=True)
        lock.acquire()
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} cannot be a folder, because a file is in its place: give another --out.") from None
    except Timeout:
        raise UserError(f"another process is writing into {folder}: wait until it ends, or stop it.") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # raised by rmdir where there are files
            os.remove(lock.lock_file)
            os.rmdir(folder)
        lock.release()


def place():
    """(rank, number of processes, device) of this process as torchrun gives them, or of the only one."""
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if world > 1 and "RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set, but not by torchrun: start with torchrun, or unset WORLD_SIZE.")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")  # cuda, or a Mac's mps
    if device.type != "cpu":
        there = torch.accelerator.device_count()
        if local >= there:
            raise UserError(f"more processes than the {there} GPUs here: give torchrun --nproc_per_node {there}.")
        device = torch.device(device.type, local)
        torch.accelerator.set_device_index(local)
    return rank, max(world, 1), device


@contextlib.contextmanager
def processes(folder, hours=24):
    """What `place` gives, with the processes connected. The first holds `folder`; none waits longer than `hours`."""
    rank, world, device = place()
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(hours=hours))
    with holding(folder) if rank == 0 else contextlib.nullcontext():
        yield rank, world, device
        barrier()
    if world > 1:
        dist.destroy_process_group()


def is_first():
    """Whether this is the first process, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def barrier():
    """Waits for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def from_all(value):
    """The value that each process has here, in a list."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def add_up(tensors):
    """Sums tensors over the processes, in place."""
    try:
        for tensor in tensors if dist.is_initialized() else ():
            dist.all_reduce(tensor)
    except RuntimeError as error:
        raise UserError(f"another process was lost ({str(error).splitlines()[0][:200]}): start all again.") from error
