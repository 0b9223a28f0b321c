"""Starts this repository's programs in processes of their own, as python or torchrun would.

The processes are forked from a server that has imported the programs once: one starts in milliseconds, and not in the
seconds that importing takes. test_faults.py starts the real torchrun."""

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["build_pairs", "evaluate", "train", "toy2d"])


def _main(program, argv, environment, said, prepare):
    os.environ.update(environment)
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    importlib.import_module("torch").set_num_threads(1)
    prepare()
    importlib.import_module(program).main([str(flag) for flag in argv])


def nothing():
    pass


class Started:
    """`processes` processes that run program.main(argv), with what torchrun puts into their environment."""

    def __init__(self, program, argv, processes=1, prepare=nothing):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.said = tempfile.NamedTemporaryFile(mode="r", suffix=".txt")
        self.processes = []
        for rank in range(processes):
            environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            environment = {name: str(value) for name, value in environment.items()} if processes > 1 else {}
            self.processes.append(context.Process(target=_main, args=(program, argv, environment, self.said.name, prepare)))
            self.processes[-1].start()

    def running(self):
        return all(process.is_alive() for process in self.processes)

    def signal(self, number, rank=0):
        os.kill(self.processes[rank].pid, number)

    def wait(self, seconds=60):
        """(the exit codes, all that the processes said)."""
        for process in self.processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes], self.said.read()


def run(program, argv, processes=1, prepare=nothing):
    return Started(program, argv, processes, prepare).wait()
