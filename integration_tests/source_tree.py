"""Keras's source tree as it would be with this patch merged into it.

Of a file that amends one of Keras's, the text follows Keras's own: each name in
its `__all__` then replaces Keras's, as `keras/overlay.py` has it. Other files
are copied. No overlay has to be installed.

    python -m integration_tests.source_tree FOLDER
"""

import ast
import builtins
import pathlib
import shutil
import sys

import keras

PATCH = pathlib.Path(__file__).parents[1] / "keras"


def build(folder):
    """Writes the package `keras` into a folder.

    Args:
        folder: an existing one, which goes onto `sys.path`.

    Returns:
        Path of the package.

    Raises:
        ValueError: if a helper of a file, or what of Python's it uses, has the
            name of something else that Keras's file has.
    """
    released = pathlib.Path(keras.__file__).parent
    package = pathlib.Path(folder) / "keras"
    shutil.copytree(
        released, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    for path in sorted(PATCH.glob("*/**/*.py")):
        target = package / path.relative_to(PATCH)
        if not target.exists() or path.name.endswith("_test.py"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        else:
            target.write_text(merged(target.read_text(), path.read_text()))
    return package


def merged(released, amending):
    """The text of a file of Keras's and of what amends it."""
    before, after = ast.parse(released), ast.parse(amending)
    mine, theirs = _definitions(after), _definitions(before)
    replaced = ast.literal_eval(mine.pop("__all__"))
    clashes = [
        name
        for name in mine.keys() & theirs.keys() - {*replaced, "upstream"}
        if mine[name] != theirs[name]
    ]
    # What is Python's own here, and Keras's there: `map`, say.
    used = {node.id for node in ast.walk(after) if isinstance(node, ast.Name)}
    clashes += (used & theirs.keys() & vars(builtins).keys()) - mine.keys()
    if clashes:
        raise ValueError(f"Names of Keras's own: {sorted(clashes)}")
    if isinstance(after.body[0], ast.Expr):
        del after.body[0]  # The docstring.
    text = amending.splitlines(keepends=True)
    start = after.body[0].lineno - 1
    for node in reversed(after.body):
        if ast.unparse(node).startswith("__all__ ="):
            # Keras's files have none: it would hide names of theirs.
            text[node.lineno - 1] = "\n"
            text[node.lineno : node.end_lineno] = []
    return released + "\n\n" + "".join(text[start:])


def _definitions(tree):
    """Names that a module defines at its top, and what as."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in node.names:
                module = getattr(node, "module", None)
                found[name.asname or name.name.split(".")[0]] = (
                    module,
                    name.name,
                )
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found[target.id] = ast.unparse(node.value)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.unparse(node)
    return found


if __name__ == "__main__":
    print(build(sys.argv[1]))
