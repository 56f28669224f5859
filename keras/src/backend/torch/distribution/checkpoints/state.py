"""Of what variables the state of a training consists.

What a `.weights.h5` file holds has the names that it has there: they do not
depend on names of layers, which Keras counts up in a program. Beside that are
the variables that such a file leaves out: seeds, adapters of LoRA, metrics.
"""

from keras.src.backend.common import global_state
from keras.src.backend.common.variables import Variable
from keras.src.backend.torch.distribution.training import accumulation
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.random import seed_generator
from keras.src.saving import saving_lib
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils import naming

OTHERS, METRICS, SEED = "others", "metrics", "global_seed"
OPTIMIZER = "optimizer"


class State:
    """The state of a model and its training.

    Attributes:
        entries: list of dicts: what a `.weights.h5` file has at a path, its
            `path`, the `name` of the object, and the `keys` of its values.
        variables: dict from names to variables. Those of several names have
            the first.
        arrays: dict from names to what objects hand to such a file that are no
            variables.
        owners: dict from paths to objects that hand such.
        same: dict from other names to the first.
        metrics: names of those that `fit` puts back at the start of an epoch.
    """

    def __init__(self):
        self.entries, self.owners = [], {}
        self.variables, self.arrays, self.same = {}, {}, {}
        self.metrics = []
        self._name_of = {}

    def add(self, name, variable):
        first = self._name_of.setdefault(id(variable), name)
        if first == name:
            self.variables[name] = variable
        else:
            self.same[name] = first

    def add_if_new(self, name, variable):
        """The name that it has then."""
        if id(variable) not in self._name_of:
            self.add(name, variable)
        return self._name_of[id(variable)]


def of(model, weights_only=False):
    """The `State` of a model that is built.

    Collective if an object hands values to a file that are no variables:
    every process calls it.

    Args:
        model: the model.
        weights_only: whether to leave out all but the model's weights.
    """
    state = State()
    for path, owner in _walk(model, "", set()):
        if weights_only and isinstance(owner, BaseOptimizer):
            continue
        _add_entry(state, path, owner)
    for i, variable in enumerate(model.variables):
        state.add_if_new(f"{OTHERS}/{i}", variable)
    if weights_only:
        return state
    if isinstance(getattr(model, "optimizer", None), BaseOptimizer):
        for i, variable in enumerate(model.optimizer.variables):
            state.add_if_new(f"{OPTIMIZER}/{OTHERS}/{i}", variable)
    variables = [v for m in getattr(model, "metrics", []) for v in m.variables]
    for i, variable in enumerate(variables):
        state.metrics.append(state.add_if_new(f"{METRICS}/{i}", variable))
    generator = global_state.get_global_attribute(
        seed_generator.GLOBAL_SEED_GENERATOR
    )
    if generator is not None:
        state.add_if_new(SEED, generator.state)
    return state


def _add_entry(state, path, owner):
    """What an object hands to a file of weights."""
    store = _Store()
    owner.save_own_variables(store)
    name = getattr(owner, "name", None)
    state.entries.append(
        {
            "path": path,
            "name": name if isinstance(name, str) else None,
            "keys": list(store),
        }
    )
    for key, value in store.items():
        if isinstance(value, Variable):
            state.add(key_of(path, key), value)
        else:
            state.arrays[key_of(path, key)] = value
            state.owners[path] = owner


class _Store(dict):
    # Optimizers then hand variables, not arrays.
    takes_variables = True


def key_of(path, key):
    """The name of a value, as in a `.weights.h5` file."""
    return f"{path}/vars/{key}" if path else f"vars/{key}"


def _walk(saveable, path, seen):
    """The objects that hand values to a file, and their paths, in the order of
    `saving_lib._save_state`, whose names these are."""
    if id(saveable) in seen:
        return
    seen.add(id(saveable))
    if hasattr(saveable, "save_own_variables"):
        yield path, saveable
    for name, child in saving_lib._walk_saveable(saveable):
        if isinstance(child, KerasSaveable):
            yield from _walk(child, _join(path, name), seen)
        elif isinstance(child, (list, dict, tuple)):
            yield from _walk_container(child, _join(path, name), seen, set())


def _walk_container(container, path, seen, containers):
    if id(container) in containers:
        return
    containers.add(id(container))
    used = {}
    if isinstance(container, dict):
        container = list(container.values())
    for child in container:
        if isinstance(child, KerasSaveable):
            name = naming.to_snake_case(child.__class__.__name__)
            name = saving_lib._get_unique_name(name, used)
            yield from _walk(child, _join(path, name), seen)
        elif isinstance(child, (list, dict, tuple)):
            name = saving_lib._get_unique_name("container", used)
            yield from _walk_container(
                child, _join(path, name), seen, containers
            )


def _join(path, name):
    return f"{path}/{name}" if path else name


def settle(model):
    """Adds up over data shards what an optimizer has accumulated.

    Collective where accumulators are partial: every process calls it.
    """
    optimizer = getattr(model, "optimizer", None)
    while isinstance(optimizer, BaseOptimizer):
        if getattr(optimizer, "_accumulated_gradients", None):
            accumulation.settle(optimizer)
        optimizer = getattr(optimizer, "inner_optimizer", None)


def restore_arrays(state, read):
    """Hands objects what they have handed to a file that is no variable.

    Args:
        state: the `State` of the model.
        read: function from names to arrays.
    """
    keys = {entry["path"]: entry["keys"] for entry in state.entries}
    for path, owner in state.owners.items():
        owner.load_own_variables(
            {key: read(key_of(path, key)) for key in keys[path]}
        )
