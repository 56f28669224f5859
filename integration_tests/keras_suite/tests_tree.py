"""The tests of a Keras source tree, laid out so that they test what is here.

Only test files are taken: all else that they import comes from the installed
Keras, with this patch over it.
"""

import builtins
import contextlib
import importlib.util
import pathlib
import shutil
import sys
import unittest
from importlib.machinery import SourceFileLoader

SUFFIX = "_test.py"
# Tests of other backends, and of what the patch replaces: it has its own.
LEFT_OUT = (
    "keras/src/backend/jax",
    "keras/src/backend/numpy",
    "keras/src/backend/openvino",
    "keras/src/backend/tensorflow",
    "keras/src/distribution",
)


def copy(source, destination):
    """Copies the test files of a Keras source tree, and what they read.

    Args:
        source: path of the tree, the folder that holds `keras/`.
        destination: path of a folder that is made.

    Raises:
        ValueError: if there are no tests in `source`.
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination)
    files = list((source / "keras").rglob(f"*{SUFFIX}"))
    if not files:
        raise ValueError(
            "The source must be a folder of Keras's sources, one that holds "
            f"`keras/` with tests in it. Received: source={source}"
        )
    data = [
        file
        for file in (source / "keras").rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    ]
    conftest = source / "conftest.py"
    for file in [*files, *data, *([conftest] if conftest.exists() else [])]:
        target = destination / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def files_of(tests, names=()):
    """The test files to run, as paths relative to `tests`, in order.

    Args:
        tests: path of a copy that `copy` made.
        names: strings; a folder or file each, from the tree's root or from
            `keras/src`. None means all.

    Raises:
        ValueError: if a name has no tests.
    """
    tests = pathlib.Path(tests)
    if not names:
        return _below(tests)
    files = []
    for name in names:
        roots = [tests / name, tests / "keras" / "src" / name]
        found = [file for root in roots for file in _below(root, tests)]
        if not found:
            raise ValueError(
                "Folders and files are named from the root of the source tree "
                f"or from `keras/src`. There are no tests in: '{name}'"
            )
        files += [file for file in found if file not in files]
    return files


def _below(root, tests=None):
    tests = tests or root
    found = [root] if root.is_file() else sorted(root.rglob(f"*{SUFFIX}"))
    relative = [file.relative_to(tests).as_posix() for file in found]
    return [
        file
        for file in relative
        if not file.startswith(tuple(f"{folder}/" for folder in LEFT_OUT))
    ]


class Finder:
    """Finds the test modules, by the names that they have in Keras's tree.

    They import each other by these.
    """

    def __init__(self, tests):
        self.tests = pathlib.Path(tests)

    def install(self):
        # Before the finder of the patch, which has tests of the same names.
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.endswith("_test"):
            return None
        file = self.tests / f"{fullname.replace('.', '/')}.py"
        if not file.is_file():
            return None
        return importlib.util.spec_from_file_location(
            fullname, file, loader=Loader(fullname, str(file))
        )


class Loader(SourceFileLoader):
    """Loads a test module, also where what it imports is not installed.

    Many name TensorFlow or JAX at their top, and use them in a few tests.
    Only the module itself sees a stand-in.
    """

    def exec_module(self, module):
        missing = {}
        while True:
            try:
                with _stand_ins(module.__name__, missing):
                    return super().exec_module(module)
            except ModuleNotFoundError as error:
                root = (error.name or "").partition(".")[0]
                if root in ("", "keras", *missing):
                    raise
                missing[root] = StandIn(root, (), {})


class StandIn(type):
    """A package that is not there, or anything in it.

    Tests may name it, also where a type must stand; the one that calls it is
    skipped.
    """

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args, **kwargs):
        raise unittest.SkipTest(f"needs {cls.__name__}")


@contextlib.contextmanager
def _stand_ins(importer, stand_ins):
    """Has a module's imports give stand-ins for packages that are not there."""
    released = builtins.__import__

    def import_one(name, globals=None, locals=None, fromlist=(), level=0):
        root, *rest = name.split(".")
        if (
            level
            or root not in stand_ins
            or (globals or {}).get("__name__") != importer
        ):
            return released(name, globals, locals, fromlist, level)
        module = stand_ins[root]
        for part in rest if fromlist else ():
            module = getattr(module, part)
        return module

    builtins.__import__ = import_one
    try:
        yield
    finally:
        builtins.__import__ = released
