"""`python -m keras_torch_distribution`: compares runs, converts checkpoints."""

import argparse
import os

from keras_torch_distribution import compare


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
    arguments = parser.parse_args(arguments)

    if arguments.command == "compare":
        parser.exit(compare.main(arguments))
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
