"""The processes: how they find each other, agree on a seed and part again."""

import atexit
import logging
import os
import random

import torch
import torch.distributed as dist

from keras.src.backend.torch import core

logger = logging.getLogger("keras.distribution")

DEFAULT_PORT = 29500


def is_running():
    """Whether this process already belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def is_first():
    """Whether this is process 0, or the only one. Starts nothing."""
    return not is_running() or dist.get_rank() == 0


def is_launched():
    """Whether a launcher such as `torchrun` describes a world to join."""
    return all(
        name in os.environ
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )


def ensure_running():
    """Joins the launcher's world, or makes a world of one process.

    Collective under a launcher, on its first call: every process calls it.
    """
    if not is_running():
        start()


def num_processes():
    """Number of processes; starts the process group under a launcher.

    Collective under a launcher, on its first call: every process calls it.
    """
    if not is_running() and is_launched():
        start()
    return dist.get_world_size() if is_running() else 1


def process_id():
    """Rank of this process; starts the process group under a launcher.

    Collective under a launcher, on its first call: every process calls it.
    """
    if not is_running() and is_launched():
        start()
    return dist.get_rank() if is_running() else 0


def start(job_addresses=None, num_processes=None, process_id=None):
    """Joins (or makes) the process group and agrees on a seed.

    Arguments win over the launcher's environment variables. With neither, a
    world of one process is made, so that one script serves both.

    Collective: every process of the job calls it.

    Args:
        job_addresses: optional string, `host:port` of process 0, or the
            addresses of all processes separated by commas. IPv6 hosts are
            written as `[::1]:1234`.
        num_processes: optional int, how many processes form the job.
        process_id: optional int, from 0 to `num_processes - 1`.

    Raises:
        ValueError: if the arguments contradict each other, or contradict the
            group that is already running.
    """
    address, num_processes = _resolve_addresses(job_addresses, num_processes)
    if is_running():
        _check_same_world(num_processes, process_id)
    elif (
        address is None
        and num_processes in (None, 1)
        and process_id in (None, 0)
        and not is_launched()
    ):
        _join(1, 0, store=dist.HashStore())
    else:
        world = _setting("num_processes", num_processes, "WORLD_SIZE")
        rank = _setting("process_id", process_id, "RANK")
        if not 0 <= rank < world:
            raise ValueError(
                "`process_id` must lie between 0 and `num_processes` - 1. "
                f"Received: process_id={rank}, num_processes={world}"
            )
        if address is None and not is_launched():
            raise ValueError(
                "`job_addresses` is needed to join a job of "
                f"{world} processes without a launcher. Pass "
                '"host:port" of process 0, set '
                "KERAS_DISTRIBUTION_JOB_ADDRESSES, or start the script with "
                f"`torchrun`. Received: job_addresses={job_addresses}"
            )
        method = "env://" if address is None else _tcp_url(address)
        _join(world, rank, init_method=method)
    agree_on_seed()


def agree_on_seed():
    """Sets one random seed on all processes, unless the user set one.

    Collective: every process of the job calls it.
    """
    from keras.src.utils import rng_utils  # Imports the backend.

    mine = rng_utils.get_random_seed()
    seed = random.randint(1, int(1e9)) if mine is None else mine
    seeds = torch.tensor([mine is not None, seed], dtype=torch.int64)
    dist.broadcast(seeds, src=0)
    is_set, seed = seeds.tolist()
    if mine is None:
        rng_utils.set_random_seed(seed)
    elif is_set and seed != mine:
        raise ValueError(
            "Every process must set the same random seed, since each draws "
            "the same initial weights. Received: seed "
            f"{mine} on process {dist.get_rank()}, {seed} on process 0."
        )


def device_type():
    """Torch's device type of this job: `"cuda"` or `"cpu"`."""
    return "cuda" if core.DEFAULT_DEVICE.startswith("cuda") else "cpu"


def local_rank(rank=None):
    """Index among the processes of one host, of `rank` or of this process."""
    if rank is None and "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    rank = process_id() if rank is None else rank
    return rank % max(_processes_on_this_host(), 1)


def _processes_on_this_host():
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return torch.cuda.device_count() if device_type() == "cuda" else 1


def _resolve_addresses(job_addresses, num_processes):
    addresses = [a.strip() for a in (job_addresses or "").split(",")]
    addresses = [a for a in addresses if a]
    if not addresses:
        return None, num_processes
    if len(addresses) > 1:
        if num_processes is not None and num_processes != len(addresses):
            raise ValueError(
                f"The provided job_addresses {addresses} has "
                f"{len(addresses)} jobs, but num_processes is {num_processes}"
            )
        num_processes = len(addresses)
    return addresses[0], num_processes


def _setting(argument, value, variable):
    if value is not None:
        return int(value)
    if variable in os.environ:
        return int(os.environ[variable])
    raise ValueError(
        f"`{argument}` is needed to join a job of several processes. Pass it, "
        f"set KERAS_DISTRIBUTION_{argument.upper()}, or start the script with "
        f"`torchrun`. Received: {argument}=None"
    )


def _tcp_url(address):
    """`host`, `host:port`, `::1` or `[::1]:port` as a rendezvous URL."""
    if address.startswith("["):
        host, _, port = address[1:].partition("]")
        port = port.lstrip(":")
    elif address.count(":") == 1:
        host, port = address.split(":")
    else:
        host, port = address, ""
    port = port or str(DEFAULT_PORT)
    if not host or not port.isdigit():
        raise ValueError(
            'An address must be of the form "host:port", or "[host]:port" for '
            f"IPv6. Received: {address}"
        )
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _join(world, rank, **rendezvous):
    options = {}
    backend = "gloo"
    if device_type() == "cuda":
        index = (
            int(os.environ["LOCAL_RANK"])
            if "LOCAL_RANK" in os.environ
            else rank
        ) % torch.cuda.device_count()
        torch.cuda.set_device(index)
        lacks = _what_nccl_lacks()
        if lacks is None:
            backend = "cpu:gloo,cuda:nccl"  # gloo for what the host reads
            options["device_id"] = torch.device("cuda", index)
        elif rank == 0:
            logger.warning(
                "Processes talk by gloo, through the memory of the host, which "
                "is slower than NCCL: %s.",
                lacks,
            )
    dist.init_process_group(
        backend, world_size=world, rank=rank, **rendezvous, **options
    )
    atexit.register(_leave, dist.group.WORLD)


def _what_nccl_lacks():
    """Why the GPUs here cannot talk by NCCL, None if they can."""
    processes, gpus = _processes_on_this_host(), torch.cuda.device_count()
    if not dist.is_nccl_available():
        return "this build of torch has no NCCL"
    if processes > gpus:
        return (
            f"it takes a GPU for each process, and {processes} processes "
            f"share {gpus}"
        )
    return None


def _leave(group):
    if is_running() and dist.group.WORLD is group:
        dist.destroy_process_group()


def _check_same_world(num_processes, process_id):
    world, rank = dist.get_world_size(), dist.get_rank()
    if num_processes not in (None, world) or process_id not in (None, rank):
        raise ValueError(
            "The process group is already running with other values: "
            f"num_processes={world}, process_id={rank}. Received: "
            f"num_processes={num_processes}, process_id={process_id}. Call "
            "`keras.distribution.initialize` once, before anything else."
        )
