"""`python -m keras_torch_distribution`: reports, compares, converts."""

import argparse
import os
import sys

from keras_torch_distribution import compare
from keras_torch_distribution import report


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m keras_torch_distribution", description=__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    compare.add_arguments(
        commands.add_parser(
            "compare",
            help="runs a program on one process and on several, and says how "
            "far losses, gradients and weights are from each other",
        )
    )
    report.add_arguments(
        commands.add_parser(
            "report",
            help="says what a program's distribution costs in memory and "
            "communication, in one process and without a GPU",
        )
    )
    to_weights = commands.add_parser(
        "to-weights", help="writes a .weights.h5 file of a sharded checkpoint"
    )
    to_weights.add_argument("checkpoint", help="a checkpoint, or a directory")
    to_weights.add_argument("file", help="ends in .weights.h5")
    from_weights = commands.add_parser(
        "from-weights", help="makes a sharded checkpoint of a .weights.h5 file"
    )
    from_weights.add_argument("file", help="ends in .weights.h5")
    from_weights.add_argument("directory")
    show = commands.add_parser("show", help="says what is in a checkpoint")
    show.add_argument("checkpoint", help="a checkpoint, or a directory")
    given = list(sys.argv[1:] if arguments is None else arguments)
    # A program's own arguments, which argparse finds in front of others only.
    end = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:end])
    if given[end:]:
        arguments.arguments = given[end + 1 :]

    if arguments.command == "compare":
        parser.exit(compare.main(arguments))
    if arguments.command == "report":
        parser.exit(report.main(arguments))
    # A command of this backend, whatever the user's is.
    os.environ["KERAS_BACKEND"] = "torch"
    import keras  # noqa: F401
    from keras.src.backend.torch.distribution.checkpoints import weights_files

    try:
        if arguments.command == "to-weights":
            path = weights_files.to_weights(
                arguments.checkpoint, arguments.file
            )
            print(f"{path} -> {arguments.file}")
        elif arguments.command == "from-weights":
            path = weights_files.from_weights(
                arguments.file, arguments.directory
            )
            print(f"{arguments.file} -> {path}")
        else:
            print(weights_files.describe(arguments.checkpoint))
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
