"""Files of Keras that know no backend: what they import, and that they do on
another backend what released Keras does."""

import ast
import pathlib

import pytest
import torch
import torch.distributed as dist

from keras.src.backend.torch import distribution_lib
from keras.src.distribution import files
from keras.src.distribution import processes

SOURCES = pathlib.Path(__file__).parents[1]
# Overlays of what is torch's own.
OF_TORCH = {
    "backend",  # a folder
    "distribution/distribution_lib.py",
    "utils/torch_utils.py",
}


def neutral_files():
    for path in sorted(SOURCES.rglob("*.py")):
        name = str(path.relative_to(SOURCES))
        if name.endswith("_test.py") or "backend/" in name:
            continue
        if name not in OF_TORCH:
            yield path


NEUTRAL = list(neutral_files())


@pytest.mark.parametrize(
    "path", NEUTRAL, ids=lambda p: str(p.relative_to(SOURCES))
)
def test_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        for name in names:
            assert not name.startswith(("torch", "keras.src.backend.torch"))


def test_the_backend_has_an_answer_to_each_question():
    for name, default in vars(processes).items():
        if hasattr(default, "__wrapped__"):
            answer = getattr(distribution_lib, name)
            assert answer is not default, name
            assert name in distribution_lib.__all__


def test_without_a_distribution_nothing_communicates(fake_world, monkeypatch):
    # One process of two, in code that the others do not run.
    fake_world(2)
    for name in ("all_reduce", "broadcast", "all_gather_object"):
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: pytest.fail())
    assert not processes.is_distributed()
    assert processes.any_process(True) and not processes.any_process(False)
    assert processes.any_of_each([1, 0]) == [True, False]
    with processes.work("nothing") as work:
        work.flag = True
    with pytest.raises(KeyError), processes.work("nothing"):
        raise KeyError
    assert processes.share_of_rows() is None
    assert not processes.spans_rows(torch.ones(2), (0,))
    assert processes.call_metric(None, max, (1, 2), {}) == 2
    assert processes.metric_result(None, lambda: 3) == 3
    assert processes.call_loss(None, lambda *args: args, 1, 2, 3) == (1, 2, 3)
    assert files.exists(__file__)
