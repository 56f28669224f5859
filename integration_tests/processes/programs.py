"""Programs as a user starts them, each in processes of its own."""

import os
import socket
import subprocess
import sys

LIMIT = 240


def free_port():
    """A port of this host, as a string, that nobody listens to now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(**variables):
    """That of a program on the host's processor, with these variables."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "KERAS_BACKEND": "torch",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def run_torchrun(folder, program, *options, processes=2, **variables):
    """Runs a program by `torchrun`, which must end well.

    Args:
        folder: path, where the program is written.
        program: string, its source.
        *options: of `torchrun`.
        processes: int.
        **variables: of the environment.

    Returns:
        Tuple of what it has written to stdout and to stderr.
    """
    path = folder / "program.py"
    path.write_text(program)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc-per-node", str(processes)),
            *("--master-port", free_port()),
            *options,
            str(path),
        ],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
