import ast
import importlib
import inspect
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import time

import pytest

from keras_torch_distribution import overlay

# A tree of its own, so that these tests judge the mechanism alone. It covers
# each kind of file: a new module, a new package, an amended module, an amended
# package, an amended package of the public API, and a test that Keras has too.
TREE = {
    "src/backend/torch/overlay_dummy.py": """
        VALUE = "new module"
    """,
    "src/backend/torch/overlay_package/__init__.py": """
        from keras.src.backend.torch.overlay_package.part import VALUE
    """,
    "src/backend/torch/overlay_package/part.py": """
        VALUE = "part of a new package"
    """,
    "src/backend/torch/trainer.py": """
        from keras.src.backend.torch import trainer as upstream

        __all__ = ["TorchTrainer"]

        class TorchTrainer(upstream.TorchTrainer):
            amended = True

        not_in_all = True
    """,
    "src/trainers/data_adapters/__init__.py": """
        from keras.src.trainers import data_adapters as upstream

        __all__ = ["get_data_adapter"]

        original = upstream.get_data_adapter

        def get_data_adapter(*args, **kwargs):
            return original(*args, **kwargs)
    """,
    "distribution/__init__.py": """
        from keras.src.backend.torch.overlay_dummy import VALUE

        __all__ = ["VALUE"]
    """,
    "src/trainers/trainer_test.py": """
        VALUE = "test of the overlay"
    """,
}


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path)


def make_tree(folder):
    root = folder / "keras_torch_distribution"
    root.mkdir()
    shutil.copy(overlay.__file__, root)
    for name, text in TREE.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return root


def run(tree, text, backend="torch"):
    """Runs `text` with `tree` as the overlay.

    Returns:
        What `text` printed, read as JSON, and the standard error.
    """
    script = tree.parent / "script.py"
    script.write_text(textwrap.dedent(text))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            # torch finds the entry point by metadata and the tree by sys.path,
            # where this folder comes before the installed one.
            "PYTHONPATH": str(tree.parent),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A program under the tree: its root, and what the program saw.

    For several tests, since Keras takes seconds to import.
    """
    root = make_tree(tmp_path_factory.mktemp("tree"))
    seen, _ = run(
        root,
        """
        import inspect
        import json
        import multiprocessing
        import sys


        def child(queue, cls):
            import keras

            queue.put([cls.amended, issubclass(keras.Model, cls)])


        def new():
            from keras.src.backend.torch import overlay_dummy
            from keras.src.backend.torch import overlay_package
            from keras.src.backend.torch.overlay_package import part
            from keras.src.trainers import trainer_test

            return {
                "values": [
                    overlay_dummy.VALUE,
                    overlay_package.VALUE,
                    part.VALUE,
                    trainer_test.VALUE,
                ],
                "names": [part.__name__, part.__package__],
                "copies": [n for n in sys.modules if n.endswith(".part")],
            }


        def amended():
            import keras
            from keras.src.backend.torch import trainer
            from keras.src.trainers import data_adapters
            from keras_torch_distribution.src.backend.torch import (
                trainer as ours,
            )

            cls = trainer.TorchTrainer
            original = cls.__mro__[1]
            return {
                "amended": cls.amended and cls is ours.TorchTrainer,
                "model": issubclass(keras.Model, cls),
                "original": [
                    original.__name__,
                    hasattr(original, "amended"),
                    inspect.getsourcefile(original) == trainer.__file__,
                ],
                "rest": [
                    hasattr(trainer, "TorchEpochIterator"),
                    hasattr(trainer, "not_in_all"),
                ],
                "called": cls.__module__,
                "package": data_adapters.get_data_adapter.__code__.co_filename,
                "submodule": data_adapters.data_adapter.__file__,
                "public": keras.distribution.VALUE,
            }


        def spawned():
            from keras.src.backend.torch.trainer import TorchTrainer

            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=child, args=(queue, TorchTrainer))
            process.start()
            result = queue.get(timeout=120)
            process.join()
            return result


        if __name__ == "__main__":
            import keras

            functions = (new, amended, spawned)
            print(json.dumps({f.__name__: f() for f in functions}))
        """,
    )
    return root, seen


class TestOverlay:
    def test_new_modules_and_packages(self, program):
        _, seen = program
        assert seen["new"] == {
            "values": [
                "new module",
                "part of a new package",
                "part of a new package",
                "test of the overlay",
            ],
            "names": [
                "keras.src.backend.torch.overlay_package.part",
                "keras.src.backend.torch.overlay_package",
            ],
            "copies": ["keras.src.backend.torch.overlay_package.part"],
        }

    def test_amended_modules_and_packages(self, program):
        root, seen = program
        seen = dict(seen["amended"])
        package = root / "src" / "trainers" / "data_adapters" / "__init__.py"
        assert seen.pop("package") == str(package)
        assert not seen.pop("submodule").startswith(str(root))
        assert seen == {
            "amended": True,
            "model": True,
            "original": ["TorchTrainer", False, True],
            "rest": [True, False],
            "called": "keras.src.backend.torch.trainer",
            "public": "new module",
        }

    def test_spawned_child(self, program):
        _, seen = program
        assert seen["spawned"] == [True, True]

    def test_import_under_own_name_first(self, tree):
        seen, _ = run(
            tree,
            """
            import json

            from keras_torch_distribution.src.backend.torch import (
                trainer as ours,
            )
            import keras

            print(json.dumps(issubclass(keras.Model, ours.TorchTrainer)))
            """,
        )
        assert seen is True

    def test_other_version_warns_once(self, tree):
        path = tree / "overlay.py"
        version = f'KERAS_VERSION = "{overlay.KERAS_VERSION}"'
        text = path.read_text()
        assert version in text
        path.write_text(text.replace(version, 'KERAS_VERSION = "0.0.1"'))
        seen, stderr = run(
            tree,
            """
            import importlib.util
            import json
            import warnings

            warnings.simplefilter("always")

            import keras
            from keras.src.backend.torch.trainer import TorchTrainer

            new = "keras.src.backend.torch.overlay_dummy"
            print(json.dumps([
                hasattr(TorchTrainer, "amended"),
                importlib.util.find_spec(new) is not None,
                hasattr(keras.distribution, "VALUE"),
            ]))
            """,
        )
        assert seen == [False, False, False]
        assert stderr.count("UserWarning: keras-torch-distribution") == 1
        assert "pip install keras==0.0.1" in stderr

    def test_other_backend_is_untouched(self, tree):
        seen, stderr = run(
            tree,
            """
            import json
            import sys
            from unittest import mock

            # Keras's numpy backend stands on a few functions of its JAX one.
            for name in ("jax", "keras.src.backend.jax"):
                sys.modules[name] = mock.MagicMock()
            sys.modules["keras.src.backend.jax.math"] = mock.MagicMock()

            import torch
            import keras
            from keras.src.backend.torch.trainer import TorchTrainer

            print(json.dumps([
                keras.backend.backend(),
                hasattr(TorchTrainer, "amended"),
                hasattr(keras.distribution, "VALUE"),
            ]))
            """,
            backend="numpy",
        )
        assert seen == ["numpy", False, False]
        assert "keras-torch-distribution" not in stderr

    def test_importing_torch_only_adds_the_finder(self, tree):
        # A broken file of the tree must not break `import torch`.
        (tree / "src" / "backend" / "torch" / "core.py").write_text("1 / 0")
        seen, _ = run(
            tree,
            """
            import json
            import sys
            from importlib.machinery import PathFinder

            import torch
            from keras_torch_distribution import overlay

            finders = sys.meta_path
            position = finders.index(overlay.OverlayFinder)
            overlay.install()
            print(json.dumps([
                "keras" in sys.modules,
                overlay._files.cache_info().currsize,
                finders[position + 1] is PathFinder,
                finders.count(overlay.OverlayFinder),
            ]))
            """,
        )
        assert seen == [False, 0, True, 1]


class TestInstall:
    def test_takes_less_than_a_millisecond(self, monkeypatch):
        finder = overlay.OverlayFinder
        times = []
        for _ in range(5):
            others = [f for f in sys.meta_path if f is not finder]
            monkeypatch.setattr(sys, "meta_path", others)
            start = time.perf_counter()
            overlay.install()
            times.append(time.perf_counter() - start)
            assert finder in sys.meta_path
        assert min(times) < 1e-3


class TestTree:
    """The project's own files, each in its place."""

    def test_does_not_hide_keras(self):
        # With it, `import keras` in this folder would find an empty package.
        assert not (overlay.ROOT / "__init__.py").exists()

    @pytest.mark.parametrize(
        "name",
        sorted(n for n in overlay._files() if not n.endswith("_test")),
    )
    def test_file_takes_effect(self, name):
        # Fails for a file that amends what Keras imports before torch, or
        # that lies where no package of Keras is.
        if name in overlay.ELSEWHERE:
            pytest.importorskip(name, exc_type=ImportError)
        module = importlib.import_module(name)
        path = overlay._files()[name]
        if pathlib.Path(module.__file__) == pathlib.Path(path):
            return
        ours = sys.modules.get(overlay.own_name(name))
        assert ours is not None, f"{name} was imported before torch"
        assert ours.__file__ == path
        for attribute in ours.__all__:
            assert getattr(module, attribute) is getattr(ours, attribute)

    def test_functions_take_what_keras_s_take(self):
        """Whoever asks for a signature sees the released one."""
        wrong, seen = {}, 0
        for name, path in overlay._files().items():
            if name in overlay.ELSEWHERE or name.endswith("_test"):
                continue
            module = importlib.import_module(name)
            if module.__file__ == path:
                continue
            tree = ast.parse(pathlib.Path(module.__file__).read_text())
            released = {
                node.name: node.args
                for node in tree.body
                if isinstance(node, ast.FunctionDef)
            }
            for each in sys.modules[overlay.own_name(name)].__all__:
                if each in released:
                    expected = parameters(released[each])
                    actual = inspect.signature(getattr(module, each))
                    seen += 1
                    names = list(actual.parameters)
                    own = names[len(expected) :]
                    # What is added here may be left out.
                    if names[: len(expected)] != expected or any(
                        actual.parameters[x].default is inspect.Parameter.empty
                        for x in own
                    ):
                        wrong[f"{name}.{each}"] = str(actual)
        assert seen > 20 and not wrong


def parameters(arguments):
    """The names of what a function takes, of `ast.arguments`."""
    several = [arguments.vararg] if arguments.vararg else []
    keywords = [arguments.kwarg] if arguments.kwarg else []
    return [
        each.arg
        for each in (
            *(*arguments.posonlyargs, *arguments.args),
            *(*several, *arguments.kwonlyargs, *keywords),
        )
    ]
