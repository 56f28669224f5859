"""The states of the random generators that a program draws from."""

import random

import numpy as np
import torch


def get():
    """The states now, to be written as JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        # The generator's own, which lies on the host.
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return states


def set(states):
    """Puts back what `get` gave; a GPU's only where there is one."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, "uint32"), *rest))
    torch.set_rng_state(_bytes(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def _bytes(text):
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
