"""Programs in processes that are forked, once Keras has been imported.

A process takes seconds to import it, and a program that fails ends its
processes. `Forks` starts one process that imports, and forks it for each
program; a child ends as the interpreter does, by `sys.excepthook` and `atexit`.
"""

import atexit
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types

from integration_tests.processes.programs import environment
from integration_tests.processes.programs import free_port

LEFT = "left behind"


class Forks:
    """Runs programs, one after the other."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration_tests.processes.forks"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder, program, processes, limit=40.0, **variables):
        """Runs a program in several processes.

        Args:
            folder: path, where the program is written.
            program: string, its source.
            processes: int.
            limit: float, seconds after which what runs is killed.
            **variables: of the environment.

        Returns:
            List of what each process has written to stderr, and list of their
            exit codes: negative for a signal, `LEFT` for what was killed here.
        """
        path = folder / "program.py"
        path.write_text(program)
        said = [str(path), processes, limit, free_port(), variables]
        self._process.stdin.write(json.dumps(said) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        errors = [
            pathlib.Path(f"{path}.{rank}").read_text()
            for rank in range(processes)
        ]
        return errors, codes

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)


def serve():
    # Here, in the process that is forked.
    import keras  # noqa: F401
    import keras.src.backend.torch.distribution_lib  # noqa: F401

    assert threading.active_count() == 1
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)


def run(path, processes, limit, port, variables):
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            os.environ.update(
                variables,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            be_program(path, rank)
        children.append(child)
    codes, end = {}, time.monotonic() + limit
    while len(codes) < processes:
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end or (
                len(codes) == processes - 1 and is_stopped(child)
            ):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = LEFT
        time.sleep(0.05)
    return [codes[child] for child in children]


def is_stopped(child):
    """Whether nobody but a signal can end a process."""
    stat = pathlib.Path(f"/proc/{child}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "T"


def be_program(path, rank):
    """Runs a program and ends this process, as an interpreter does."""
    file = os.open(f"{path}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    atexit._clear()
    code = 0
    try:
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        source = pathlib.Path(path).read_text()
        exec(compile(source, path, "exec"), main.__dict__)
    except SystemExit as error:
        code = error.code or 0
    except BaseException as error:
        sys.last_value = error
        sys.excepthook(type(error), error, error.__traceback__.tb_next)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
