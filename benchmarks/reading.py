"""How long `fit` takes of data that is slow to read.

    python benchmarks/reading.py

A batch takes `--seconds` to read, in which the processor does nothing; the
model is small. Of a `PyDataset` with two workers each process reads some
batches; what it took when each read all is measured beside it, in the same
processes, one after the other. Of a `DataLoader` each reads its rows. One
device's time is that of one process.
"""

import argparse
import os
import statistics
import time

import report
from processes import launch

ROWS, FEATURES = 16, 8


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", default="1,8")
    parser.add_argument("--batches", type=int, default=65)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    arguments = options.batches, options.seconds, options.rounds
    report.print_head("data", "processes", "who reads", "seconds of an epoch")
    for processes in map(int, options.processes.split(",")):
        for found in launch(worker, arguments, processes, patience=900):
            for (data, who), seconds in found.items():
                report.print_row(
                    data, processes, who, f"{statistics.median(seconds):.2f}"
                )


def worker(rank, report, batches, seconds, rounds):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import numpy as np
    import torch

    import keras
    from keras.src.backend.torch import trainer

    keras.distribution.initialize()
    row = np.zeros(FEATURES, "float32")

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return batches

        def __getitem__(self, index):
            time.sleep(seconds)
            return np.stack([row] * ROWS), np.stack([row] * ROWS)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return batches * ROWS

        def __getitem__(self, index):
            time.sleep(seconds / ROWS)
            return row, row

    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model = keras.Sequential(
        [keras.Input((FEATURES,)), keras.layers.Dense(FEATURES)]
    )
    model.compile("sgd", "mse")

    def epoch(data):
        began = time.perf_counter()
        model.fit(data, shuffle=False, verbose=0)
        return time.perf_counter() - began

    def loader():
        return torch.utils.data.DataLoader(Rows(), batch_size=ROWS)

    found = {}
    # Builds the model.
    model.fit(np.stack([row] * 16), np.stack([row] * 16), verbose=0)
    for _ in range(rounds):
        for key, make, is_shared in (
            (("PyDataset, 2 workers", "all"), lambda: Batches(2), False),
            (("PyDataset, 2 workers", "one"), lambda: Batches(2), True),
            (("DataLoader", "each its rows"), loader, True),
        ):
            with reading_by_all(not is_shared, trainer):
                found.setdefault(key, []).append(epoch(make()))
    if rank == 0:
        report(found)


class reading_by_all:
    """Within it, every process reads all batches, as if nothing were shared."""

    def __init__(self, is_on, trainer):
        iterator = trainer.TorchEpochIterator.__init__
        self.module = iterator.__globals__["feeding"].by_index
        self.is_on, self.released = is_on, self.module.reading

    def __enter__(self):
        if self.is_on:
            self.module.reading = lambda adapter, context: None

    def __exit__(self, *error):
        self.module.reading = self.released


if __name__ == "__main__":
    main()
