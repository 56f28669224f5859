"""Lays this tree over the released Keras package, module by module.

On the torch backend, when `keras.a.b` is imported and this tree has `a/b.py`
or `a/b/__init__.py`:

- if Keras has no such module, or it is a test, the file is that module (a new
  folder is a package only with an `__init__.py`, as everywhere in Keras);
- if it has, Keras's own runs first, then the file runs as
  `keras_torch_distribution.a.b`, and each name in its `__all__` takes the
  place of the same name in `keras.a.b`. Until then the file finds Keras's
  original there:

```python
from keras.src.backend.torch import trainer as upstream

__all__ = ["TorchTrainer"]


class TorchTrainer(upstream.TorchTrainer):
    ...
```

So are modules of KerasHub, which write files beside a model's (`ELSEWHERE`).

PyTorch calls `install` at the end of `import torch` (the entry point group
`torch.backends`). Keras imports torch before it imports anything of its torch
backend, but after `keras.src.backend.common`, which can not be amended.
"""

import functools
import importlib.util
import pathlib
import sys
import types
import warnings
from importlib.machinery import PathFinder
from importlib.machinery import SourceFileLoader

KERAS_VERSION = "3.15.1"
ROOT = pathlib.Path(__file__).parent
# By the module that they amend, files for another package than Keras.
ELSEWHERE = {
    "keras_hub.src.utils.preset_utils": "hub_presets",
    "keras_hub.src.utils.transformers.export.hf_exporter": "hub_exports",
}


def install():
    """Adds the finder to Python's import system. Does nothing else.

    An exception or slowness here would hit every `import torch` on the
    machine, Keras or not.
    """
    if OverlayFinder in sys.meta_path:
        return
    # Right in front of Python's own finder and no further: hooks that
    # rewrite what they import, such as pytest's, go on seeing these modules.
    finders = sys.meta_path
    position = finders.index(PathFinder) if PathFinder in finders else 0
    finders.insert(position, OverlayFinder)


class OverlayFinder:
    """Finds the modules of `keras` that this tree adds or amends."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if not fullname.startswith("keras") or fullname not in _files():
            return None
        if not _applies():
            return None
        file = _files()[fullname]
        spec = PathFinder.find_spec(fullname, path)
        if spec is None and fullname in ELSEWHERE:
            return None
        if spec is None or spec.origin == file or fullname.endswith("_test"):
            return importlib.util.spec_from_file_location(fullname, file)
        spec.loader = AmendingLoader(fullname, spec.origin, file)
        return spec


class AmendingLoader(SourceFileLoader):
    """Runs a module of Keras, then puts an overlay file's names into it.

    Args:
        fullname: The module's name, such as `keras.src.backend.torch.trainer`.
        path: Path of Keras's own file.
        overlay_path: Path of the file that amends it.
    """

    def __init__(self, fullname, path, overlay_path):
        super().__init__(fullname, path)
        self.overlay_path = overlay_path

    def exec_module(self, module):
        super().exec_module(module)
        overlay = self._run_overlay(module.__name__)
        for name in overlay.__all__:
            value = getattr(overlay, name)
            # What is pickled or saved under the overlay must also load
            # without it, so it bears the name that Keras knows it by.
            if (
                isinstance(value, (type, types.FunctionType))
                and value.__module__ == overlay.__name__
            ):
                value.__module__ = module.__name__
            setattr(module, name, value)

    def _run_overlay(self, fullname):
        # Not `importlib.import_module`: that would run the `__init__.py` of
        # the overlay's parent packages before those of Keras have finished.
        name = own_name(fullname)
        spec = importlib.util.spec_from_file_location(name, self.overlay_path)
        overlay = importlib.util.module_from_spec(spec)
        sys.modules[name] = overlay
        try:
            spec.loader.exec_module(overlay)
        except BaseException:
            sys.modules.pop(name, None)
            raise
        return overlay


def own_name(fullname):
    """The name of the file of ours that amends a module."""
    if fullname in ELSEWHERE:
        return f"{__package__}.{ELSEWHERE[fullname]}"
    return fullname.replace("keras", __package__, 1)


@functools.cache
def _files():
    """Returns this tree's files, as a dict from module name to path."""
    files = {n: str(ROOT / f"{file}.py") for n, file in ELSEWHERE.items()}
    for path in ROOT.glob("*/**/*.py"):
        module = path.relative_to(ROOT).with_suffix("")
        if module.name == "__init__":
            module = module.parent
        files[".".join(("keras", *module.parts))] = str(path)
    return files


def _applies():
    """Whether this is the backend and the Keras that the tree was made for."""
    from keras.src.backend.config import backend
    from keras.src.version import __version__

    if backend() != "torch":
        return False
    if __version__ != KERAS_VERSION:
        _warn_of_version(__version__)
        return False
    return True


@functools.cache
def _warn_of_version(version):
    warnings.warn(
        f"keras-torch-distribution amends Keras {KERAS_VERSION} and stays "
        f"inactive, since Keras {version} is installed. To use it, run "
        f"`pip install keras=={KERAS_VERSION}`; to be rid of this warning, "
        "run `pip uninstall keras-torch-distribution`."
    )
