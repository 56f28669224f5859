"""Models leave Keras as one device has them."""

import functools

from keras.src.distribution import files
from keras.src.distribution import processes


def by_one_device(export):
    """Wraps a function that traces a model and writes what it does to a file.

    The process that writes traces it alone, with whole weights and without a
    distribution. If it fails there, all raise; when it returns, the file is
    there.

    Collective under a distribution: every process calls it.
    """

    @functools.wraps(export)
    def export_once(model, filepath, *args, **kwargs):
        with processes.distribution_of(model):
            if not processes.is_distributed():
                return export(model, filepath, *args, **kwargs)
            is_other = files.is_other()
            # The work of all: within it, the one that writes has no
            # distribution.
            with (
                processes.work(f"writing {filepath}"),
                processes.as_one_device(model),
            ):
                if not is_other:
                    export(model, filepath, *args, **kwargs)
            return filepath

    return export_once
