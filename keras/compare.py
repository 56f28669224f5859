"""Compares a program on one process and on several.

`python -m keras_torch_distribution compare train.py --processes 4` runs it
twice, for a few steps, and says how far losses, gradients and weights are from
each other, and what a step takes.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

CHILD = f"{__package__}.compare_child"
# Seconds that a launcher has to end its processes, of which it needs 30 where
# they do not listen.
PATIENCE = 60
# Numbers below it are zero.
NOTHING = 1e-30


class Failed(RuntimeError):
    """A run did not come to its end."""


def add_arguments(parser):
    """Adds what the command takes to an `argparse` parser."""
    parser.add_argument("script", help="a program that trains, unchanged")
    parser.add_argument(
        "arguments", nargs="*", help="its own arguments, after `--`"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=3, help="updates of weights; 3 if not set"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference that is rounding, as a part of the largest "
        "entry of a gradient or a weight; 1e-4 if not set",
    )
    parser.add_argument(
        "--timeout", type=float, default=600, help="seconds a run; 600"
    )


def main(options):
    """Runs the program twice and prints what differs.

    Args:
        options: what `add_arguments` describes.

    Returns:
        The exit status: 0 if both runs gave the same numbers, 1 if not, 2 if
        one of them did not come to its end.
    """
    if options.processes < 2:
        print(
            "One process is compared with several: `--processes` is 2 or more. "
            f"Received: {options.processes}"
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            runs = [
                run(options, n, pathlib.Path(folder, str(n)))
                for n in (1, options.processes)
            ]
        except Failed as error:
            print(error)
            return 2
    text, same = report(*runs, options)
    print(text)
    return 0 if same else 1


def run(options, processes, folder):
    """What the program does on so many processes.

    Returns:
        Dict from "steps", "losses", ... to what `compare_child` wrote.

    Raises:
        Failed: with the end of what the program printed.
    """
    folder.mkdir()
    child = ["-m", CHILD, str(folder), str(options.steps)]
    child += [str(options.processes), options.script, *options.arguments]
    command = [sys.executable, *child]
    if processes > 1:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), *child),
        ]
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    print(f"{options.script} on {_processes(processes)} ...", flush=True)
    with open(folder / "printed", "w+") as printed:
        process = subprocess.Popen(
            command, env=environment, stdout=printed, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(options.timeout)
        except subprocess.TimeoutExpired:
            status = f"it ran longer than {options.timeout:g} s"
        finally:
            end_process(process)
        printed.seek(0)
        end = printed.read().splitlines()[-30:]
    results = sorted(folder.glob("result*.json"))
    if status != 0 or len(results) != processes:
        if status == 0:
            status = "it made no update by an optimizer of Keras's"
        elif isinstance(status, int):
            status = f"exit status {status}"
        raise Failed(
            "\n".join(
                [
                    *end,
                    "",
                    f"{options.script} failed on {_processes(processes)}: "
                    f"{status}. It printed the above at last.",
                ]
            )
        )
    said = [json.loads(path.read_text()) for path in results]
    with np.load(folder / "arrays.npz") as arrays:
        return {
            **said[0],
            "memory": max(each["memory"] for each in said),
            "seconds": max(each["seconds"] for each in said),
            "arrays": dict(arrays),
        }


def end_process(process):
    """Ends a process that runs still, and those that it has launched.

    A launcher ends its own at SIGTERM, and not where it is killed.
    """
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def report(one, several, options):
    """What two runs have in common.

    Args:
        one, several: what `run` returned.
        options: of the command.

    Returns:
        Tuple of the text and whether the numbers are the same.
    """
    rows, problems = [], []
    if one["steps"] != several["steps"]:
        problems.append(
            f"{one['steps']} updates on one process, {several['steps']} on "
            f"{_processes(options.processes)}"
        )
    for name in sorted(one["losses"].keys() ^ several["losses"].keys()):
        problems.append(f"'{name}' is in the logs of one run alone")
    for name in sorted(one["losses"].keys() & several["losses"].keys()):
        a, b = one["losses"][name], several["losses"][name]
        far = [
            (_relative(np.array(x), np.array(y)), f"step {i + 1}")
            for i, (x, y) in enumerate(zip(a, b))
        ]
        rows.append((name, f"{a[-1]:.6g}", f"{b[-1]:.6g}", *max(far)))
    found = {}
    for key in sorted(one["arrays"].keys() | several["arrays"].keys()):
        kind, step, path = key.split("|", 2)
        where = path if kind == "weights" else f"{path}, step {step}"
        a, b = (run["arrays"].get(key) for run in (one, several))
        if a is None or b is None or a.shape != b.shape:
            shapes = [x if x is None else x.shape for x in (a, b)]
            problems.append(f"{kind} of {where}: shapes {shapes}")
            continue
        found.setdefault(kind, []).append((_relative(a, b), where))
    for kind, far in found.items():
        name = "weights and slots" if kind == "weights" else kind
        rows.append((name, *[f"{len(far)} arrays"] * 2, *max(far)))
    lines = _table(
        [
            ("", "one process", _processes(options.processes), "differ by", ""),
            *((*row[:3], f"{row[3]:.1e}", row[4]) for row in rows),
            ("seconds a step", *_pair(one, several, "seconds", 1, ".3g")),
            ("peak memory, MiB", *_pair(one, several, "memory", 2**20, ".0f")),
        ]
    )
    too_far = [row for row in rows if not row[3] <= options.tolerance]
    for kind, far in found.items():
        worst = [
            f"  {value:.1e}  {kind} of {where}"
            for value, where in sorted(far, reverse=True)
            if not value <= options.tolerance
        ]
        if worst:
            lines += ["", f"{kind.capitalize()} that differ most:", *worst[:8]]
    if problems:
        lines += ["", *problems[:8]]
    same = not too_far and not problems
    steps = f"{one['steps']} steps"
    lines += [
        "",
        f"The same numbers, to {options.tolerance:g}, in {steps}."
        if same
        else f"NOT the same numbers, to {options.tolerance:g}, in {steps}.",
    ]
    if not several["distribution"]:
        lines.append("No distribution was set: each process has trained alone.")
        same = False
    return "\n".join(lines), same


def _relative(a, b):
    """The largest difference of two arrays, as a part of their largest entry;
    infinite where one of them alone is no number."""
    a, b = a.astype("float64"), b.astype("float64")
    if not (np.isfinite(a) == np.isfinite(b)).all():
        return float("inf")
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    size = max(np.abs(a).max(initial=0), np.abs(b).max(initial=0))
    if size < NOTHING:
        return 0.0
    return float(np.abs(a - b).max(initial=0) / size)


def _pair(one, several, name, unit, form):
    values = [format(run[name] / unit, form) for run in (one, several)]
    note = "largest of all processes" if name == "memory" else ""
    return (*values, "", note)


def _table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells, note in rows:
        cells = [x.rjust(width) for x, width in zip(cells, widths[1:])]
        line = "  ".join((name.ljust(widths[0]), *cells, note))
        lines.append(line.rstrip())
    return lines


def _processes(count):
    return "one process" if count == 1 else f"{count} processes"
