"""The processes: how they find each other, agree on a seed and part again."""

import atexit
import datetime
import gc
import logging
import multiprocessing
import os
import random
import sys
import warnings
import weakref

import torch
import torch.distributed as dist

from keras.src.backend.torch.distribution import private
from keras.src.backend.torch.distribution.mesh import failures
from keras.src.backend.torch.distribution.mesh import gloo_on_gpus
from keras.src.backend.torch.distribution.mesh import watch

logger = logging.getLogger("keras.distribution")

DEFAULT_PORT = 29500
LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What launchers that describe no world to join call the number of processes.
OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
# Tells the processes that this one starts that it has joined, and as what.
JOINED = "KERAS_TORCH_DISTRIBUTION_JOINED"
ENVIRONMENT = {"init_method": "env://"}
# Seconds until a wait for the others is an error; not set, torch's own: half an
# hour on gloo, ten minutes on NCCL.
TIMEOUT = "KERAS_DISTRIBUTION_TIMEOUT"
# In torchrun's store: that it was used, by an attempt that failed.
USED = "keras_torch_distribution/used"

_said = set()
_before_leaving = []
_after_leaving = []
_timeout = [None]


def is_running():
    """Whether this process already belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def is_first():
    """Whether this is process 0, or the only one. Starts nothing."""
    return not is_running() or dist.get_rank() == 0


def is_launched():
    """Whether a launcher such as `torchrun` describes a world to join."""
    return all(name in os.environ for name in LAUNCH)


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
    if is_running():
        return dist.get_world_size()
    if not is_launched():
        _check_alone()
        return 1
    if _is_worker():
        return int(os.environ["WORLD_SIZE"])
    start()
    return dist.get_world_size()


def process_id():
    """Rank of this process; starts the process group under a launcher.

    Collective under a launcher, on its first call: every process calls it.
    """
    if is_running():
        return dist.get_rank()
    if not is_launched():
        _check_alone()
        return 0
    if _is_worker():
        return int(os.environ["RANK"])
    start()
    return dist.get_rank()


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
            group that is already running, or if a launcher's variables are
            not complete.
        RuntimeError: in a process that one of the job's has started, such as
            a worker of a `DataLoader`.
    """
    _check_not_worker()
    address, num_processes = _resolve_addresses(job_addresses, num_processes)
    if is_running():
        _check_same_world(num_processes, process_id)
    elif (
        address is None
        and num_processes in (None, 1)
        and process_id in (None, 0)
        and not is_launched()
    ):
        if num_processes is None:
            _check_alone()
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


def set_timeout(seconds):
    """Sets how long this process waits for the others, once all have joined.

    Args:
        seconds: number. It wins over the environment variable.
    """
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(
            "`timeout` is a number of seconds, more than 0. Received: "
            f"timeout={seconds!r}"
        )
    if is_running() and seconds != timeout():
        raise ValueError(
            "`timeout` is given to the first call of "
            "`keras.distribution.initialize`, before anything else. Received: "
            f"timeout={seconds}, while it is {timeout() or 'as torch has it'}"
        )
    _timeout[0] = float(seconds)


def timeout():
    """How many seconds the user lets a process wait for others, or None."""
    if _timeout[0] is not None or not os.environ.get(TIMEOUT):
        return _timeout[0]
    try:
        seconds = float(os.environ[TIMEOUT])
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(
            f"{TIMEOUT} is a number of seconds, more than 0. Received: "
            f"{TIMEOUT}={os.environ[TIMEOUT]!r}"
        )
    return seconds


def limit(group):
    """Lets waits in a process group end after the time that the user has set.

    Not as it is made: the same time would be one for others to start in.
    """
    seconds = timeout()
    if seconds is not None:
        group.set_timeout(datetime.timedelta(seconds=seconds))


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
    # Here, since it stands on this module.
    from keras.src.backend.torch import core

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
        else:
            gloo_on_gpus.install()
            before_leaving(gloo_on_gpus.remove)
            if rank == 0:
                logger.warning(
                    "Processes talk by gloo, through the memory of the host, "
                    "which is slower than NCCL: %s.",
                    lacks,
                )
    seconds = timeout()
    store = _store_of_torchrun() if rendezvous == ENVIRONMENT else None
    if store is not None:
        rendezvous = {"store": store}
    dist.init_process_group(
        backend, world_size=world, rank=rank, **rendezvous, **options
    )
    if store is not None and rank == 0:
        # All have looked for it by now.
        store.underlying_store.set(USED, "yes")
    limit(dist.group.WORLD)
    if world > 1:
        os.environ[JOINED] = _name_in_job()
        everyones = private.store_of_all()
        # NCCL ends the process then, and says nothing of the others.
        patience = 0.8 * seconds if seconds and "nccl" in backend else None
        before_leaving(watch.begin(everyones, rank, world, seconds, patience))
        keeps_store = rank == 0 and store is None
        after_leaving(failures.begin(everyones, rank, world, keeps_store))
    atexit.register(_leave, weakref.ref(dist.group.WORLD))


def _store_of_torchrun():
    """A store for this attempt, None without torchrun.

    With `--max-restarts` and addresses that are given (not a rendezvous of
    torchrun's own) attempts share one store, and in it the addresses of
    processes that are no more.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=dist.default_pg_timeout,
    )
    attempt = "0"
    if store.check([USED]):
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"keras_torch_distribution/{attempt}", store)


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


def before_leaving(release):
    """Calls `release()` as the interpreter ends, before the group ends.

    A group ends when nothing refers to it any more. Whoever keeps a group, or
    what torch made of it, for as long as the process lives registers here.
    """
    if release not in _before_leaving:
        _before_leaving.append(release)


def after_leaving(release):
    """Calls `release()` as the interpreter ends, when the group has ended."""
    _after_leaving.append(release)


def _leave(group):
    """Leaves the group as the interpreter ends.

    The threads of gloo must end before the interpreter does: one that drops
    the last reference to a tensor later than that asks for the lock of an
    interpreter that is no more, which ends in `terminate called without an
    active exception` (torch 2.13).

    After an exception the others may wait for this process, and what it has
    begun is never met: it waits for nothing, and lets them hear of it.

    Args:
        group: weak reference to the group that this process has joined.
    """
    os.environ.pop(JOINED, None)
    # Also where the program has ended the group itself.
    for release in _before_leaving:
        release()
    failed = getattr(sys, "last_value", None) is not None
    if failed:
        # A group that a frame keeps does not end, and the others wait on.
        failures.forget_frames(sys.last_value)
    # A cycle, as Keras's `tree` leaves them behind, may keep a graph of
    # autograd's, and with it work of a group.
    gc.collect()
    if is_running() and dist.group.WORLD is group():
        if failed and "nccl" in dist.get_backend_config():
            private.abort_groups()
        else:
            dist.destroy_process_group()
    for release in _after_leaving:
        release()


def _name_in_job():
    return f"{os.getpid()} {' '.join(os.environ.get(n, '') for n in LAUNCH)}"


def _is_worker():
    """Whether a process of the job has started this one, to help it."""
    if torch.utils.data.get_worker_info() is not None:
        return True
    # As what an ancestor has joined. Another job has other variables.
    joined, mine = os.environ.get(JOINED), _name_in_job()
    if joined is None or joined == mine:
        return False
    if not is_launched() and multiprocessing.parent_process() is None:
        return False
    return joined.partition(" ")[2] == mine.partition(" ")[2]


def _check_not_worker():
    if _is_worker():
        raise RuntimeError(
            "The processes of a job cannot be joined by a worker that one of "
            "them has started, such as a `DataLoader`'s: it would wait for "
            "the others for ever. Call `keras.distribution.initialize` and "
            "`set_distribution` in the main process only, below `if __name__ "
            '== "__main__":` where workers import the script again. Received: '
            f"a call in process {os.getpid()}, a worker of process "
            f"{os.environ.get('RANK', '0')} of the job."
        )


def _check_alone():
    """Says where this process would train alone, and others beside it.

    Raises:
        ValueError: if a launcher's variables are not complete.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world.strip() not in ("", "0", "1"):
        missing = [name for name in LAUNCH if name not in os.environ]
        raise ValueError(
            f"WORLD_SIZE={world} says that there are several processes, but "
            "not how they find each other: the environment variables "
            f"{missing} are not set. Set them, start the script with "
            "`torchrun`, or unset WORLD_SIZE to run one process alone."
        )
    for name, launcher in OTHER_LAUNCHERS.items():
        world = os.environ.get(name, "1")
        if world != "1" and name not in _said:
            _said.add(name)
            warnings.warn(
                f"{launcher} has started {world} processes ({name}), and each "
                f"trains alone: the environment variables {list(LAUNCH)} that "
                "tell how they find each other are not set. Set them from "
                f"what {launcher} says, or start `torchrun` with it, once a "
                "host.",
                stacklevel=3,
            )


def _check_same_world(num_processes, process_id):
    world, rank = dist.get_world_size(), dist.get_rank()
    if num_processes not in (None, world) or process_id not in (None, rank):
        raise ValueError(
            "The process group is already running with other values: "
            f"num_processes={world}, process_id={rank}. Received: "
            f"num_processes={num_processes}, process_id={process_id}. Call "
            "`keras.distribution.initialize` once, before anything else."
        )
