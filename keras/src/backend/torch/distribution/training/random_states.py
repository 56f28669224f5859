"""The states of the random generators that a program draws from."""

import random

import numpy as np
import torch

from keras.src.backend.common import global_state
from keras.src.backend.torch import core
from keras.src.random import seed_generator


def get():
    """The states now, to be written as JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": as_text(torch.get_rng_state()),
    }
    generator = _of_gpu()
    if generator is not None:
        states["cuda"] = as_text(generator.get_state())
    return states


def set(states):
    """Puts back what `get` gave; a GPU's only where there is one."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, "uint32"), *rest))
    torch.set_rng_state(from_text(states["torch"]))
    generator = _of_gpu()
    if generator is not None and "cuda" in states:
        generator.set_state(from_text(states["cuda"]))


def mark():
    """What differs after one of the host's generators, or Keras's own, has been
    drawn from."""
    kind, keys, *rest = np.random.get_state()
    generator = global_state.get_global_attribute(
        seed_generator.GLOBAL_SEED_GENERATOR
    )
    return (
        torch.get_rng_state().numpy().tobytes(),
        keys.tobytes(),
        *rest,
        random.getstate(),
        # It is written anew with each draw.
        generator and generator.state.value._version,
    )


def _of_gpu():
    """The generator of this process's GPU, whose state lies on the host; None
    where no GPU has been used."""
    generators = torch.cuda.default_generators
    return generators[torch.cuda.current_device()] if generators else None


def of_model(model):
    """As `get`, with the seeds that a model and Keras count on."""
    states = get()
    states["seeds"] = [_numbers(s) for s in _seeds_of(model)]
    generator = global_state.get_global_attribute(
        seed_generator.GLOBAL_SEED_GENERATOR
    )
    states["seed"] = None if generator is None else _numbers(generator.state)
    return states


def set_of_model(model, states):
    """Puts back what `of_model` gave."""
    seeds = _seeds_of(model)
    if len(seeds) != len(states["seeds"]):
        raise ValueError(
            f"The model has {len(seeds)} seed generators, and those of "
            f"{len(states['seeds'])} were saved. Build the model as the "
            "program did that saved it."
        )
    for seed, numbers in zip(seeds, states["seeds"]):
        seed.assign(numbers)
    if states["seed"] is not None:
        # It is made when it is first used.
        seed_generator.global_seed_generator().state.assign(states["seed"])
    set(states)


def _seeds_of(model):
    seeds = {}
    for layer in model._flatten_layers():
        for generator in layer._seed_generators:
            seeds[id(generator)] = generator.state
    return list(seeds.values())


def _numbers(seed):
    return core.convert_to_numpy(seed).tolist()


def as_text(state):
    """A state of a generator of torch's, for JSON."""
    return state.numpy().tobytes().hex()


def from_text(text):
    """The state that `as_text` has written."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
