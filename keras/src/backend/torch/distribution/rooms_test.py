"""Imports go downwards, and those on one floor know nothing of each other."""

import ast
import pathlib

HERE = pathlib.Path(__file__).parent
NAME = "keras.src.backend.torch.distribution"
FLOORS = [
    {"marks", "modes", "private"},
    {"mesh"},
    {"tensors"},
    {"batch"},
    {"global_rows", "gradients"},
    {"ops"},
    {"variables"},
    {"layers"},
    {"training"},
    {"checkpoints", "report"},
    {"seam"},
]
# What is ambient, torch's private names, and what code of Keras that knows no
# backend asks.
ROOMS_OF_ONE_FILE = ("marks", "modes", "private", "seam")


def imports_of(path, anywhere=True):
    """The modules that a file imports, anywhere in it or as it is imported."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                yield f"{node.module}.{name.name}"
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def files():
    for path in HERE.rglob("*.py"):
        if not path.name.endswith("_test.py") and path.parent != HERE:
            yield path.relative_to(HERE).parts[0], path
    for room in ROOMS_OF_ONE_FILE:
        yield room, HERE / f"{room}.py"


def floor_of(room):
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def test_every_file_is_in_a_room():
    rooms = {room for room, _ in files()}
    assert rooms == set().union(*FLOORS)
    loose = {path.stem for path in HERE.glob("*.py")}
    loose -= {"__init__", *ROOMS_OF_ONE_FILE}
    assert all(name.endswith("_test") for name in loose)


def test_imports_go_downwards():
    wrong = []
    for room, path in files():
        for name in imports_of(path):
            if not name.startswith(f"{NAME}."):
                continue
            other = name.removeprefix(f"{NAME}.").partition(".")[0]
            if other != room and floor_of(other) >= floor_of(room):
                wrong.append(f"{path.relative_to(HERE)} imports {name}")
    assert not wrong


def test_nothing_imports_the_overlays_above():
    above = [
        "keras.src.backend.torch.distribution_lib",
        "keras.src.backend.torch.trainer",
        "keras.src.backend.torch.layer.",
        "keras.src.backend.torch.nn.",
    ]
    wrong = [
        f"{path.relative_to(HERE)} imports {name}"
        for _, path in files()
        for name in imports_of(path)
        if name.startswith(tuple(above))
    ]
    assert not wrong


def test_what_core_stands_on_does_not_import_it():
    todo, seen = [HERE.parent / "core.py"], set()
    while todo:
        path = todo.pop()
        for name in imports_of(path, anywhere=False):
            module = name.removeprefix(f"{NAME}.").replace(".", "/")
            for part in (module, module.rpartition("/")[0]):
                file = HERE / f"{part}.py"
                if name.startswith(f"{NAME}.") and file.exists():
                    if file not in seen:
                        seen.add(file)
                        todo.append(file)
    wrong = [
        str(path.relative_to(HERE))
        for path in seen
        if any(
            name.startswith("keras.src.backend.torch.core")
            for name in imports_of(path, anywhere=False)
        )
    ]
    assert len(seen) > 20 and not wrong
