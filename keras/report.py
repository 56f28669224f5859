"""Tells what a program's distribution costs, without its processes.

`python -m keras_torch_distribution report train.py --processes 8` runs it, on
the host and in this process alone, which plays the first of eight, until two
of its steps are alike, and prints the report of its layout. With `--auto` it
is the layout that is found for it (`report_auto`).
"""

import argparse
import contextlib
import io
import math
import os
import pathlib
import runpy
import sys
import traceback
import typing

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Enough(BaseException):
    """Ends the program: it has made as many steps as were asked for."""


class Nothing(RuntimeError):
    """There is nothing to report, and its text says why."""


class Seen(typing.NamedTuple):
    """What was seen of a program.

    Attributes:
        report: `Report`.
        model: that it trains.
        inputs: what the model is called with, tensors without memory.
        distribution: that it trains under.
    """

    report: typing.Any
    model: typing.Any
    inputs: typing.Any
    distribution: typing.Any


def add_arguments(parser):
    """Adds what the command takes to an `argparse` parser."""
    parser.add_argument("script", help="a program that trains, unchanged")
    parser.add_argument(
        "arguments", nargs="*", help="its own arguments, after `--`"
    )
    parser.add_argument("--processes", type=int, help="that it would run on")
    parser.add_argument(
        "--mesh",
        type=_sizes,
        help="sizes of the mesh's axes, in place of its own: 2,4",
    )
    parser.add_argument(
        "--auto",
        action="store_true",
        help="of the layout map that is found (LayoutMap.auto), and its code",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="GIB",
        help="with --auto: what a process may hold of weights, gradients and "
        "slots",
    )
    parser.add_argument(
        "--all", action="store_true", help="all variables and collectives"
    )
    parser.add_argument(
        "--picture", nargs="?", const="", metavar="PATH", help="who stores what"
    )
    parser.add_argument("--json", metavar="FILE", help="all facts")
    parser.add_argument("--svg", metavar="FILE", help="an image")


def _sizes(text):
    try:
        sizes = tuple(int(n) for n in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"sizes of axes, such as 2,4, are expected. Received: {text}"
        )
    return sizes


def _number_of_processes(options):
    if not pathlib.Path(options.script).exists():
        raise Nothing(f"There is no file {options.script}.")
    if options.budget is not None and not options.auto:
        raise Nothing("--budget is for a layout that is found: pass --auto.")
    processes, sizes = options.processes, options.mesh
    if processes is None and sizes is None:
        raise Nothing("Pass --processes 8, or --mesh 2,4.")
    if sizes is not None and processes not in (None, math.prod(sizes)):
        raise Nothing(
            f"A mesh of {sizes} has {math.prod(sizes)} processes. Received: "
            f"--processes {processes}"
        )
    processes = math.prod(sizes) if sizes else processes
    if processes < 2:
        raise Nothing(
            "One process alone communicates nothing, and stores all. "
            f"Received: --processes {processes}"
        )
    return processes


def main(options):
    """Runs the program and prints its report.

    Args:
        options: what `add_arguments` describes.

    Returns:
        The exit status: 0, or 2 if there is nothing to report.
    """
    try:
        processes = _number_of_processes(options)
        for name in LAUNCH:
            os.environ.pop(name, None)
        os.environ["KERAS_BACKEND"] = "torch"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if options.auto:
            report, text = _auto(options, processes)
        else:
            report, text = run(options, processes).report, None
    except Nothing as error:
        print(error)
        return 2
    print(report)
    shape = tuple(report.facts["mesh"]["shape"])
    if options.mesh not in (None, shape) and not options.auto:
        print(
            f"note: the program's mesh has {len(shape)} axes, and keeps the "
            f"sizes that it gives them: --mesh names {len(options.mesh)}"
        )
    if text:
        print(f"\n{text}")
    if options.all:
        print(f"\n{report.variables()}\n\n{report.collectives()}")
    if options.picture is not None:
        print(f"\n{report.picture(options.picture or None)}")
    if options.json:
        pathlib.Path(options.json).write_text(report.to_json())
    if options.svg:
        pathlib.Path(options.svg).write_text(report.svg())
    return 0


def _auto(options, processes):
    from keras_torch_distribution import report_auto

    return report_auto.run(options, processes)


def run(options, processes, within=contextlib.nullcontext):
    """Runs the program until two of its steps are alike.

    Args:
        options: what `add_arguments` describes.
        processes: int, of which this one plays the first.
        within: function that gives a context manager, to run it in.

    Returns:
        What is `Seen`.

    Raises:
        Nothing: if it fails, or trains nothing, or on one process alone.
    """
    from keras.src.backend.torch.distribution.mesh import context
    from keras.src.backend.torch.distribution.report import dry_run
    from keras.src.backend.torch.distribution.report import fake_world
    from keras.src.backend.torch.distribution.report.recorder import Recorder
    from keras.src.distribution import report as report_lib

    found, count = [], [0]

    def updated(optimizer):
        count[0] += 1
        if count[0] % dry_run.steps_of(optimizer):
            return
        recorder.cut()
        current = context.current()
        if current is None or recorder.model is None:
            raise Enough
        if recorder.is_steady() or len(recorder.steps) > dry_run.STEPS:
            seen = dry_run.facts_of(recorder)
            distribution = current.distribution
            report = report_lib.of_recorded(
                recorder.model, distribution, seen, optimizer
            )
            found.append(
                Seen(report, recorder.model, recorder.inputs, distribution)
            )
            raise Enough

    printed, recorder = io.StringIO(), Recorder(updated)
    arguments, path = sys.argv, list(sys.path)
    sys.argv = [options.script, *options.arguments]
    sys.path.insert(0, str(pathlib.Path(options.script).resolve().parent))
    error = None
    try:
        with (
            dry_run.own_session(),
            fake_world.of(processes),
            recorder,
            _mesh(options.mesh, processes),
            contextlib.redirect_stdout(printed),
            within(),
        ):
            runpy.run_path(options.script, run_name="__main__")
    except Enough:
        pass  # What was asked for has been found, or that there is none.
    except SystemExit as ended:
        error = _of_program(ended) if ended.code else None
    except Exception as failed:
        error = _of_program(failed)
    finally:
        sys.argv, sys.path[:] = arguments, path
    if found:
        return found[0]
    end = "\n".join(printed.getvalue().splitlines()[-20:])
    if error is not None:
        raise Nothing(f"{end}\n{error}\n{options.script} failed: see above.")
    if count[0]:
        raise Nothing(
            f"{options.script} trains without a distribution of several "
            "processes. Set one before the model is built, or pass --auto, "
            "which finds a layout for it."
        )
    raise Nothing(
        f"{end}\n{options.script} made no update by Keras's optimizers, so "
        "there is no step to report: it has to call `fit`, `train_on_batch` "
        "or an optimizer's `apply`."
    )


def _of_program(error):
    """The traceback of an error, without those who run the program."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in (
        __file__,
        runpy.__file__,
        "<frozen runpy>",
    ):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _mesh(sizes, processes):
    """Within it, meshes with as many axes have these sizes, if any."""
    from keras.src.backend.torch.distribution import modes
    from keras.src.distribution.distribution_lib import DeviceMesh

    released = DeviceMesh.__init__

    def init(self, shape, axis_names, devices=None):
        if sizes is not None and len(shape) == len(sizes):
            shape = sizes
            devices = [f"cpu:{i}" for i in range(processes)]
        released(self, shape, axis_names, devices)

    return modes.swapped([(DeviceMesh, "__init__", init)])
