"""The tests of a Keras source tree, laid out so that they test what is here.

Only test files are taken: all else that they import comes from the installed
Keras, with this patch over it.
"""

import importlib.util
import pathlib
import shutil
import sys

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
    """Copies the test files of a Keras source tree, and its `conftest.py`.

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
    conftest = source / "conftest.py"
    for file in [*files, *([conftest] if conftest.exists() else [])]:
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
        return importlib.util.spec_from_file_location(fullname, file)
