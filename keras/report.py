"""Tells what a program's distribution costs, without its processes.

`python -m keras_torch_distribution report train.py --processes 8` runs it, on
the host and in this process alone, which plays the first of eight, until two
of its steps are alike, and prints the report of its layout.
"""

import contextlib
import io
import os
import pathlib
import runpy
import sys
import traceback

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Enough(BaseException):
    """Ends the program: it has made as many steps as were asked for."""


def add_arguments(parser):
    """Adds what the command takes to an `argparse` parser."""
    parser.add_argument("script", help="a program that trains, unchanged")
    parser.add_argument(
        "arguments", nargs="*", help="its own arguments, after `--`"
    )
    parser.add_argument("--processes", type=int, help="that it would run on")
    parser.add_argument(
        "--mesh",
        type=lambda text: tuple(int(n) for n in text.split(",")),
        help="sizes of the mesh's axes, in place of its own: 2,4",
    )
    parser.add_argument(
        "--all", action="store_true", help="all variables and collectives"
    )
    parser.add_argument(
        "--picture", nargs="?", const="", metavar="PATH", help="who stores what"
    )
    parser.add_argument("--json", metavar="FILE", help="all facts")
    parser.add_argument("--svg", metavar="FILE", help="an image")


def main(options):
    """Runs the program and prints its report.

    Args:
        options: what `add_arguments` describes.

    Returns:
        The exit status: 0, or 2 if there is nothing to report.
    """
    processes = options.processes
    if options.mesh:
        product = 1
        for size in options.mesh:
            product *= size
        if processes not in (None, product):
            print(
                f"A mesh of {options.mesh} has {product} processes. Received: "
                f"--processes {processes}"
            )
            return 2
        processes = product
    if processes is None:
        print("Pass --processes 8, or --mesh 2,4.")
        return 2
    for name in LAUNCH:
        os.environ.pop(name, None)
    os.environ["KERAS_BACKEND"] = "torch"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    report, said = _run(options, processes)
    if report is None:
        print(said)
        return 2
    print(report)
    if options.all:
        print(f"\n{report.variables()}\n\n{report.collectives()}")
    if options.picture is not None:
        print(f"\n{report.picture(options.picture or None)}")
    if options.json:
        pathlib.Path(options.json).write_text(report.to_json())
    if options.svg:
        pathlib.Path(options.svg).write_text(report.svg())
    return 0


def _run(options, processes):
    """The `Report`, or None, and why there is none."""
    from keras.src.backend.torch.distribution.mesh import context
    from keras.src.backend.torch.distribution.report import dry_run
    from keras.src.backend.torch.distribution.report import fake_world
    from keras.src.backend.torch.distribution.report.recorder import Recorder
    from keras.src.distribution import report as report_lib

    found, count = [None], [0]

    def updated(optimizer):
        count[0] += 1
        if count[0] % dry_run.steps_of(optimizer):
            return
        recorder.cut()
        current = context.current()
        if current is None or recorder.model is None:
            raise Enough
        if recorder.is_steady() or len(recorder.steps) > dry_run.STEPS:
            found[0] = report_lib.of_recorded(
                recorder.model,
                current.distribution,
                dry_run.facts_of(recorder),
                optimizer,
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
        ):
            runpy.run_path(options.script, run_name="__main__")
    except Enough:
        pass  # What was asked for has been found, or that there is none.
    except (Exception, SystemExit):
        error = traceback.format_exc()
    finally:
        sys.argv, sys.path[:] = arguments, path
    if found[0] is not None:
        return found[0], None
    end = "\n".join(printed.getvalue().splitlines()[-20:])
    if error is not None:
        return None, f"{end}\n{error}\n{options.script} failed: see above."
    if count[0]:
        return None, (
            f"{options.script} trains without a distribution of several "
            "processes. Set one before the model is built."
        )
    return (
        None,
        f"{end}\n{options.script} made no update by Keras's optimizers.",
    )


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
