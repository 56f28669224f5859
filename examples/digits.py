"""Handwritten digits: a small Dense network on scikit-learn's own images.

One program, the same losses on any number of processes:

    python examples/digits.py --distribution none
    torchrun --nproc-per-node 2 examples/digits.py --distribution data
    torchrun --nproc-per-node 2 examples/digits.py --distribution model
    torchrun --nproc-per-node 4 examples/digits.py --model-axis 2
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "torch")

from report import EpochLine
from report import print_once
from report import print_storage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras


def make_distribution(name, model_axis=None):
    """Makes the `keras.distribution` object for all devices there are."""
    devices = keras.distribution.list_devices()
    if name == "data":
        return keras.distribution.DataParallel(devices=devices)

    model_axis = model_axis or min(2, len(devices))
    mesh = keras.distribution.DeviceMesh(
        shape=(len(devices) // model_axis, model_axis),
        axis_names=("batch", "model"),
        devices=devices,
    )
    # The first layer is cut by its outputs, the second by its inputs: what
    # lies between them stays cut, and needs no communication.
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*hidden_1/kernel"] = (None, "model")
    layout_map[".*hidden_1/bias"] = ("model",)
    layout_map[".*hidden_2/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(
        layout_map=layout_map, batch_dim_name="batch"
    )


def make_model():
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu", name="hidden_1"),
            keras.layers.Dense(64, activation="relu", name="hidden_2"),
            keras.layers.Dense(10, name="digit"),
        ],
        name="digits",
    )
    model.compile(
        optimizer=keras.optimizers.SGD(0.02, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def load_data():
    """Images as (rows, 64) between 0 and 1, split 1437 to 360."""
    x, y = load_digits(return_X_y=True)
    x = x.astype("float32") / 16
    return train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--distribution", choices=("none", "data", "model"), default="model"
    )
    parser.add_argument("--model-axis", type=int)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if args.distribution != "none":
        keras.distribution.initialize()
        distribution = make_distribution(args.distribution, args.model_axis)
        keras.distribution.set_distribution(distribution)
        print_once(distribution)

    keras.utils.set_random_seed(args.seed)
    x_train, x_test, y_train, y_test = load_data()
    model = make_model()
    model.fit(
        x_train,
        y_train,
        validation_data=(x_test, y_test),
        batch_size=args.batch_size,
        epochs=args.epochs,
        verbose=0,
        callbacks=[EpochLine()],
    )

    loss, accuracy = model.evaluate(
        x_test, y_test, batch_size=args.batch_size, verbose=0
    )
    print_once(f"evaluate  loss {loss:.5f}  accuracy {accuracy:.5f}")
    logits = model.predict(x_test, batch_size=args.batch_size, verbose=0)
    right = (logits.argmax(axis=-1) == y_test).sum()
    print_once(f"predict   {right} of {len(y_test)} right\n")
    print_storage(model)


if __name__ == "__main__":
    main()
