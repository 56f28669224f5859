"""One process of `compare`: runs a program, and writes down what it computes.

    python -m keras_torch_distribution.compare_child FOLDER STEPS DEVICES \
        script.py ARGUMENTS

Alone, it runs the program as one device does, whatever distribution it sets.
"""

import contextlib
import json
import os
import pathlib
import resource
import runpy
import sys
import time

import numpy as np

os.environ["KERAS_BACKEND"] = "torch"

import torch  # noqa: E402

import keras  # noqa: E402
from keras.src.backend.torch import distribution_lib as backend  # noqa: E402
from keras.src.callbacks.callback_list import CallbackList  # noqa: E402
from keras.src.distribution import distribution_lib  # noqa: E402
from keras.src.optimizers.base_optimizer import BaseOptimizer  # noqa: E402


class Enough(BaseException):
    """Ends the program: it has made as many steps as were asked for."""


class Recorder:
    """What a program computes in its first steps.

    Attributes:
        losses: dict from names of logs to lists of floats, one a step.
        has_distribution: whether an update was made under a distribution.
        arrays: dict from `kind|step|path` to whole arrays.
    """

    def __init__(self, steps):
        self.wanted, self.steps = steps, 0
        self.losses, self.arrays = {}, {}
        self.times, self.variables = [], {}
        self.has_distribution = False

    def before_update(self, optimizer, grads, variables):
        """Collective under a distribution: it gathers gradients."""
        if self.steps == self.wanted:
            self.end()
        self.steps += 1
        # It may be set for as long as a `with` lasts.
        if keras.distribution.distribution() is not None:
            self.has_distribution = True
        self.times.append([time.perf_counter()] * 2)
        for variable in (*variables, *optimizer.variables):
            self.variables[variable.path] = variable
        if optimizer.gradient_accumulation_steps:
            return  # They are a part of what is applied.
        for variable, grad in zip(variables, grads):
            if grad is not None:
                key = f"gradients|{self.steps}|{variable.path}"
                self.arrays[key] = _array(grad)
        # What is recorded takes no part in the time of a step.
        self.times[-1][1] = time.perf_counter()

    def after_batch(self, logs):
        for name, value in (logs or {}).items():
            self.losses.setdefault(name, []).append(float(value))

    def end(self):
        """Collective under a distribution: it gathers weights."""
        for path, variable in self.variables.items():
            self.arrays[f"weights|{self.steps}|{path}"] = _array(variable.value)
        raise Enough


def _array(x):
    """The whole of a tensor, as an array.

    Collective for a sharded one.
    """
    x = keras.ops.convert_to_numpy(keras.ops.cast(x, "float32"))
    return np.array(x)


@contextlib.contextmanager
def recording(recorder):
    """Within it, Keras's updates and batches are recorded."""
    apply = BaseOptimizer.apply
    batch_end = CallbackList.on_train_batch_end

    def recorded_apply(self, grads, trainable_variables=None):
        grads = list(grads)
        variables = trainable_variables
        if variables is None:
            variables = self._trainable_variables
        variables = list(variables)
        recorder.before_update(self, grads, variables)
        return apply(self, grads, trainable_variables and variables)

    def recorded_batch_end(self, batch, logs=None):
        recorder.after_batch(logs)
        return batch_end(self, batch, logs)

    BaseOptimizer.apply = recorded_apply
    CallbackList.on_train_batch_end = recorded_batch_end
    try:
        yield
    finally:
        BaseOptimizer.apply = apply
        CallbackList.on_train_batch_end = batch_end


@contextlib.contextmanager
def alone(devices):
    """Within it a program finds so many devices, and sets no distribution."""
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    names = [f"{kind}:{i}" for i in range(devices)]
    replaced = {
        (backend, "list_devices"): lambda device_type=None: names,
        (backend, "get_device_count"): lambda device_type=None: devices,
        (backend, "initialize"): lambda *args, **kwargs: None,
        (distribution_lib, "set_distribution"): lambda value: None,
        (keras.distribution, "set_distribution"): lambda value: None,
    }
    released = {key: getattr(*key) for key in replaced}
    for key, value in replaced.items():
        setattr(*key, value)
    try:
        yield
    finally:
        for key, value in released.items():
            setattr(*key, value)


def peak_memory():
    """Bytes: of the GPU, or of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def seconds(times):
    """The median time of a step, without the first and what was recorded."""
    spans = [
        after[0] - before[1] for before, after in zip(times[1:], times[2:])
    ]
    return float(np.median(spans)) if spans else float("nan")


def main(folder, steps, devices, script, *arguments):
    recorder = Recorder(int(steps))
    is_alone = "RANK" not in os.environ
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(pathlib.Path(script).resolve().parent))
    keras.utils.set_random_seed(0)
    # Dropout and the like give one device's numbers then, on any mesh.
    distribution_lib.Distribution.draw_global_batch = True
    with contextlib.ExitStack() as stack:
        if is_alone:
            stack.enter_context(alone(int(devices)))
        stack.enter_context(recording(recorder))
        try:
            runpy.run_path(script, run_name="__main__")
            if recorder.steps:
                recorder.end()
        except Enough:
            pass
    if not recorder.steps:
        return
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        np.savez(pathlib.Path(folder, "arrays.npz"), **recorder.arrays)
    said = {
        "steps": recorder.steps,
        "losses": recorder.losses,
        "memory": peak_memory(),
        "seconds": seconds(recorder.times),
        "distribution": recorder.has_distribution,
    }
    pathlib.Path(folder, f"result{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
