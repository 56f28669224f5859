"""Checks an installed wheel, or that nothing is left once it is uninstalled.

Run it from outside of the repository, in an environment with Keras and torch:

    python package_smoke.py installed PATH_OF_THE_REPOSITORY
    python package_smoke.py removed
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import sys

os.environ["KERAS_BACKEND"] = "torch"

# Keras first, as in a user's program: it imports torch, and torch the overlay.
import keras  # noqa: E402

ADDED = "keras.src.backend.torch.distribution_lib"


def check_installed(repository):
    from keras_torch_distribution import overlay

    assert pathlib.Path(sys.prefix) in overlay.ROOT.parents, overlay.ROOT
    source = pathlib.Path(repository, "keras")
    expected = {path.relative_to(source) for path in source.rglob("*.py")}
    packed = {p.relative_to(overlay.ROOT) for p in overlay.ROOT.rglob("*.py")}
    assert packed == expected, sorted(packed ^ expected)

    devices = keras.distribution.list_devices()
    assert devices, devices
    assert pathlib.Path(sys.modules[ADDED].__file__).is_relative_to(
        overlay.ROOT
    )
    print(f"installed: {len(packed)} files, devices {devices}")


def check_removed():
    assert importlib.util.find_spec("keras_torch_distribution") is None
    assert importlib.util.find_spec(ADDED) is None
    root = pathlib.Path(keras.__file__).parent
    for name, module in list(sys.modules.items()):
        if name.startswith("keras.") and getattr(module, "__file__", None):
            assert root in pathlib.Path(module.__file__).parents, module

    # Each file of Keras is the one that was released.
    count = 0
    for file in importlib.metadata.files("keras"):
        if file.hash is None:
            continue
        digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
        encoded = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        assert encoded == file.hash.value, file
        count += 1
    assert count > 0
    print(f"removed: {count} files of Keras {keras.__version__} as released")


if __name__ == "__main__":
    {"installed": check_installed, "removed": check_removed}[sys.argv[1]](
        *sys.argv[2:]
    )
