"""Names of attributes on objects of others stand in one file."""

import ast
import pathlib

from keras.src.backend.torch.distribution import marks

HERE = pathlib.Path(__file__).parent
NAMES = {name: value for name, value in vars(marks).items() if name.isupper()}


def test_each_name_is_one_thing():
    assert len(set(NAMES.values())) == len(NAMES)


def test_no_other_file_writes_such_a_name():
    places = []
    for path in [*HERE.rglob("*.py"), *HERE.parent.glob("*.py")]:
        if path.name.endswith("_test.py") or path.name == "marks.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "value", None))
            if isinstance(name, str) and (
                name in NAMES.values() or name.startswith("_keras_")
            ):
                places.append(f"{path.name}:{node.lineno}: {name}")
    assert not places
