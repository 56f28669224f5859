"""Starts the processes of a measurement, and ends them whatever happens."""

import faulthandler
import multiprocessing
import os
import queue
import re
import signal
import socket
import time
import traceback


class ProcessError(RuntimeError):
    """A process died, or none said anything for too long."""


def launch(worker, arguments, num_processes=2, patience=300):
    """Runs `worker(rank, report, *arguments)` in fresh processes.

    The processes find each other by the environment variables of `torchrun`,
    and run one thread each.

    Args:
        worker: function of a module; `report` takes any picklable message.
        arguments: tuple.
        num_processes: int.
        patience: seconds without a message after which all are ended.

    Yields:
        The messages, as they come, until all processes have ended.

    Raises:
        ProcessError: if a process fails or nothing is heard for `patience`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "OMP_NUM_THREADS": "1",
        "KERAS_BACKEND": "torch",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    # Children inherit it before they import anything.
    os.environ.update(environment)
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    processes = [
        context.Process(target=_run, args=(worker, rank, messages, arguments))
        for rank in range(num_processes)
    ]
    try:
        for process in processes:
            process.start()
        yield from _listen(processes, messages, patience)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _run(worker, rank, messages, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    faulthandler.register(signal.SIGUSR1)
    try:
        worker(rank, messages.put, *arguments)
    except BaseException as e:
        messages.put(Failure(rank, describe(e), traceback.format_exc()))
        raise SystemExit(1)


class Failure:
    """The message of a process that raised."""

    def __init__(self, rank, error, trace):
        self.rank = rank
        self.error = error
        self.trace = trace


def describe(error, length=300):
    """An exception in one line."""
    # Without the colors of Keras's messages.
    text = re.sub(r"\x1b\[\d*m", "", f"{type(error).__name__}: {error}")
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + "..."


def _show_stacks(processes):
    """Lets each process print where it is to the standard error."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1)


def _listen(processes, messages, patience):
    heard = time.monotonic()
    while True:
        # Before the queue, so that no last message is missed.
        running = any(process.is_alive() for process in processes)
        died = [p.exitcode for p in processes if p.exitcode]
        try:
            message = messages.get(timeout=0.5)
        except queue.Empty:
            if died:
                raise ProcessError(f"a process ended with code {died[0]}")
            if not running:
                return
            if time.monotonic() - heard > patience:
                _show_stacks(processes)
                raise ProcessError(f"nothing was heard for {patience} s")
            continue
        heard = time.monotonic()
        if isinstance(message, Failure):
            raise ProcessError(f"rank {message.rank}: {message.error}")
        yield message
