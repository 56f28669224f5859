"""A model and its training are saved, and restored on any mesh."""

import torch

from keras.src import version
from keras.src.backend.torch import core
from keras.src.backend.torch.distribution.checkpoints import folders
from keras.src.backend.torch.distribution.checkpoints import parts
from keras.src.backend.torch.distribution.checkpoints import reading
from keras.src.backend.torch.distribution.checkpoints import saving
from keras.src.backend.torch.distribution.checkpoints import state as state_lib
from keras.src.backend.torch.distribution.mesh.context import own_distribution
from keras.src.backend.torch.distribution.training import position
from keras.src.backend.torch.distribution.training import preemption
from keras.src.backend.torch.distribution.training import random_states
from keras.src.random import seed_generator

Saver = saving.Saver
position_of = position.of
listen_for_preemption = preemption.listen

# Of what a checkpoint is: all that training goes on from, or weights, with or
# without an optimizer's.
TRAINING, WEIGHTS = "training", "weights"
# The names of what the program keeps as arrays begin so.
ARRAYS = "arrays"


def latest(directory):
    """The newest checkpoint of a directory, None without one. Waits for what
    this process has left under way."""
    saving.end_left(directory)
    return folders.latest(directory)


def save(
    saver,
    model,
    step,
    training=None,
    user=None,
    weights_only=False,
    arrays=None,
):
    """Saves a model that is built, while the program goes on.

    Collective under a distribution: every process calls it.

    Args:
        saver: the `Saver` of the directory.
        model: the model.
        step: int, for the name of the checkpoint.
        training: dict with the `epoch`, and the `position` in its data or
            None.
        user: what the program keeps beside it, of which JSON is made.
        weights_only: whether to save the model's weights alone.
        arrays: dict from names to numpy arrays that are kept too. What the
            first process has is written.
    """
    with own_distribution(model):
        _check_built(model, "saved")
        training = dict(training or {})
        where = training.pop("position", None)
        own = {}
        if not weights_only:
            state_lib.settle(model)
            own["random"] = random_states.get()
            if where is not None:
                where = dict(where)
                # Of each process, as a dataset may draw otherwise there.
                own["began"] = where.pop("began")
                own["random"] = where.pop("now")
                training["position"] = where
        state = state_lib.of(model, weights_only)
        tensors = {n: v._value for n, v in state.variables.items()}
        for name, value in state.arrays.items():
            value = core.convert_to_numpy(value)
            tensors[name] = torch.from_numpy(value.copy())
        manifest = {
            "of": WEIGHTS if weights_only else TRAINING,
            "keras": version.__version__,
            "step": step,
            "training": training,
            "user": user,
            "entries": state.entries,
            "same": state.same,
        }
        kept = {
            f"{ARRAYS}/{name}": core.convert_to_tensor(value).cpu()
            for name, value in (arrays or {}).items()
        }
        saver.save(tensors, own, step, manifest, kept)


class Restored:
    """What a checkpoint says beside the values of variables.

    Attributes:
        path: of the checkpoint.
        step: int, as it was saved.
        is_training: whether training goes on from it.
        epoch: int, the epoch to go on with, None if it was not in `fit`.
        position: dict, the position in the data of that epoch, or None.
        metrics: list of pairs of a variable and its value in that epoch.
        user: what the program has kept.
    """

    def __init__(self, reader, own):
        manifest = reader.manifest
        self.path, self.step = reader.folder, manifest["step"]
        self.is_training = manifest["of"] == TRAINING
        self.epoch = manifest["training"].get("epoch")
        self.position = manifest["training"].get("position")
        if self.position is not None:
            self.position["began"] = own["began"]
            self.position["now"] = own["random"]
        self.metrics, self.user = [], manifest["user"]
        self._reader = reader

    def read_array(self, name):
        """One of the arrays that the program has kept."""
        x = reading.read_whole(self._reader, f"{ARRAYS}/{name}")
        return core.convert_to_numpy(x)

    def restore_metrics(self):
        for variable, value in self.metrics:
            with torch.no_grad():
                variable._value.detach().copy_(value)


def restore(model, path, weights_only=False):
    """Restores a model, and the random states, from a checkpoint.

    Every process reads its own shards of it, whatever mesh and layouts it was
    saved under. The states of metrics are kept aside, as `fit` resets them.

    Collective under a distribution: every process calls it.

    Args:
        model: the model, built, of the same architecture.
        path: path-like, of a checkpoint, or of a directory for its latest.
        weights_only: whether to restore the model's weights alone.

    Returns:
        A `Restored`.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if something of it is missing, cut short or damaged.
        ValueError: if it is of another model.
    """
    with own_distribution(model), saving.work(f"looking into {path}"):
        saving.end_left(path)
    with own_distribution(model), saving.work(f"restoring from {path}"):
        _check_built(model, "restored")
        reader = reading.ShardReader(path)
        is_training = reader.manifest["of"] == TRAINING and not weights_only
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None and not optimizer.built and not weights_only:
            optimizer.build(model.trainable_variables)
        if is_training and state_lib.SEED in reader.manifest["tensors"]:
            # It is made when it is first used.
            seed_generator.global_seed_generator()
        state_lib.settle(model)
        state = state_lib.of(model, weights_only)
        variables = _matching(state, reader, is_training)
        state_lib.restore_arrays(
            state, lambda name: reading.read_whole(reader, name).numpy()
        )
        targets = {n: parts.stored(v._value)[0] for n, v in variables.items()}
        own = _own(reader)
        result = Restored(reader, own)
        result.is_training = is_training
        for name in state.metrics:
            if name in targets and is_training:
                part = targets[name]
                copy = torch.empty_like(part.local)
                targets[name] = part._replace(local=copy)
                result.metrics.append((variables[name], copy))
        reading.fill(reader, targets)
        for variable in variables.values():
            variable._origin = variable.written = None
        if is_training and own is not None:
            random_states.set(own["random"])
    return result


def _own(reader):
    """What a process has kept of its own, when as many were there: ours; else
    the first's, as most of it is the same on all."""
    rank, world = saving.place()
    return reader.read_own(rank if reader.manifest["processes"] == world else 0)


def _matching(state, reader, is_training):
    """The variables to be restored, by the names that the checkpoint has.

    Raises:
        ValueError: if it has other ones.
    """
    saved = reader.manifest["tensors"]
    same = {**reader.manifest["same"], **{n: n for n in saved}}
    found, wrong = {}, []
    for name, variable in state.variables.items():
        if name not in same:
            if not _may_differ(name, reader, is_training):
                wrong.append(f"it lacks '{name}' ({variable.path})")
            continue
        shape = tuple(saved[same[name]][1])
        if shape != tuple(variable.shape):
            wrong.append(
                f"'{name}' ({variable.path}) has shape {shape} there, and "
                f"{tuple(variable.shape)} here"
            )
        found[same[name]] = variable
    wrong += [f"it lacks '{n}'" for n in state.arrays if n not in saved]
    known = {*found, *state.arrays, *state.variables, *state.same}
    has_optimizer = any(n.startswith(state_lib.OPTIMIZER) for n in known)
    wrong += [
        f"it has '{name}', which is not here"
        for name in saved
        if name not in known
        and not _may_differ(name, reader, is_training and has_optimizer)
    ]
    if wrong:
        raise ValueError(
            f"The checkpoint {reader.folder} is of another model, in "
            f"{len(wrong)} values: {'; '.join(wrong[:5])}. Build the model, "
            "and compile it, as the program did that saved it."
        )
    return found


def _may_differ(name, reader, is_training):
    """Whether a value may be in a checkpoint and not here, or here alone."""
    kind = name.split("/")[0]
    if kind == state_lib.METRICS:
        # Of an epoch under way they are part of it.
        where = reader.manifest["training"].get("position")
        return where is None or not where["batch"]
    # A file of weights has no seeds, and need not have slots.
    return kind in (reading.OWN, ARRAYS) or (
        not is_training
        and kind in (state_lib.OPTIMIZER, state_lib.OTHERS, state_lib.SEED)
    )


def _check_built(model, what):
    if not model.built:
        raise ValueError(
            f"A model is built before it is {what}: call it on a batch, or "
            f"call `build`. Received: model={model}"
        )
