"""The command that reports what a program's distribution costs."""

import argparse
import json

import pytest

import keras
from keras_torch_distribution import __main__ as command
from keras_torch_distribution import report

PROGRAM = """
import sys

import keras
import numpy as np

keras.distribution.initialize()
devices = keras.distribution.list_devices()
mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"))
layout_map = keras.distribution.LayoutMap(mesh)
layout_map[".*up/kernel"] = (None, "model")
layout_map[".*dwn/kernel"] = ("model", None)
if "alone" not in sys.argv:
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=layout_map, batch_dim_name="batch"
        )
    )
model = keras.Sequential(
    [keras.layers.Dense(64, "relu", name="up"), keras.layers.Dense(8)]
)
x = np.zeros((8, 16), "float32")
y = np.zeros((8, 8), "float32")
if "reports" in sys.argv:
    twin = keras.Sequential([keras.Input((16,)), keras.layers.Dense(12)])
    twin.compile("sgd", "mse")
    print(keras.distribution.report(twin, 4))
if "fails" in sys.argv:
    raise ValueError("no data")
if "predicts" in sys.argv:
    sys.exit(model.predict(x, verbose=0) is None)
if "loop" in sys.argv:
    optimizer = keras.optimizers.SGD(0.1)
    for _ in range(9):
        error = model(x) - keras.ops.convert_to_tensor(y)
        loss = keras.ops.mean(keras.ops.square(error))
        loss.backward()
        grads = [v.value.grad for v in model.trainable_variables]
        optimizer.apply(grads, model.trainable_variables)
        model.zero_grad()
else:
    model.compile("adam", "mse")
    print("a line of the program's own")
    model.fit(x, y, batch_size=4, epochs=9)
raise AssertionError("it runs until two steps are alike")
"""


@pytest.fixture
def run(no_world, tmp_path, monkeypatch, capsys):
    """A function that reports the program, with these arguments of its own;
    it returns the exit status and what was printed."""
    for name in (*report.LAUNCH, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "3")
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)

    def run(own, *options):
        with pytest.raises(SystemExit) as ended:
            command.main(["report", str(script), *options, "--", own])
        return ended.value.code, capsys.readouterr().out

    return run


@pytest.mark.parametrize("way", ["fit", "loop", "reports"])
def test_a_program(run, tmp_path, way):
    facts = tmp_path / "facts.json"
    mesh = ["--processes", "4"] if way == "loop" else ["--mesh", "2,4"]
    options = [*mesh, "--json", str(facts), "--picture", "up/kernel", "--all"]
    status, said = run(way, *options)
    assert status == 0, said
    shape = "1 x model 4 = 4" if way == "loop" else "2 x model 4 = 8"
    for words in (
        f"mesh batch {shape} processes; a batch of {8 if way == 'loop' else 4}",
        ".*dwn/kernel  matches nothing",
        "up/kernel (16, 64): column over model",
    ):
        assert words in said, said
    assert "of the program's own" not in said
    listed = json.loads(facts.read_text())["collectives"]
    # The layer after the one that is cut gathers what it is handed.
    assert any(
        c["op"] == "all_gather" and c["layer"].startswith("sequential")
        for c in listed
        if c["layer"]
    )


def code_in(said):
    """The layout map of the program that is printed: a dict of axes."""
    program = said[
        said.index("mesh = keras") : said.index("keras.distribution.set")
    ]
    devices = [f"cpu:{i}" for i in range(8)]
    program = program.replace("])", "], devices)", 1)
    names = {"keras": keras, "devices": devices}
    exec(program, names)
    found = names["layout_map"]
    return {key: found[key].axes for key in found}


@pytest.mark.parametrize("way", ["fit", "loop", "alone"])
def test_a_layout_that_is_found(run, tmp_path, way):
    facts = tmp_path / "facts.json"
    options = ["--auto", "--mesh", "2,4", "--json", str(facts)]
    status, said = run(way, *options)
    assert status == 0, said
    variables = json.loads(facts.read_text())["variables"]
    cut = {v["path"].partition("/")[2]: v["axes"] for v in variables}
    assert cut["up/kernel"] == [None, ["model"]]
    assert cut["dense/kernel"] == [["model"], None]
    assert set(code_in(said).values()) == {
        (None, "model"),
        ("model", None),
        ("model",),
    }
    assert "runner-up:" in said
    # What it has itself is set aside, and told.
    words = "by the layout map of " in said
    assert words == (way != "alone")


def test_a_budget_and_a_joined_mesh(run):
    options = ["--auto", "--mesh", "2,2,2", "--budget", "1e-7"]
    status, said = run("alone", *options)
    assert status == 0 and '["batch", "model_model_2"]' in said, said
    assert "(FSDP). It does not fit" in said


def test_nothing_to_report(run):
    status, said = run("fails", "--processes", "2")
    assert status == 2 and "ValueError: no data" in said
    status, said = run("alone", "--processes", "2")
    assert status == 2 and "or pass --auto" in said
    status, said = run("fails", "--processes", "2", "--auto")
    assert status == 2 and "ValueError: no data" in said
    assert "runpy" not in said
    status, said = run("alone", "--mesh", "4,1", "--auto")
    assert status == 2 and "so none cuts weights. Pass --mesh" in said
    status, said = run("predicts", "--processes", "2", "--auto")
    assert status == 2 and "made no update by Keras's optimizers" in said
    status, said = run("fit", "--mesh", "2,2,2")
    assert status == 0 and "note: the program's mesh has 2 axes" in said


def test_arguments(capsys, tmp_path):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    script = tmp_path / "t.py"
    script.touch()
    for options, words in (
        ([], "Pass --processes"),
        (["--mesh", "2,4", "--processes", "6"], "has 8 processes"),
        (["--processes", "1"], "One process alone"),
        (["--processes", "2", "--budget", "1"], "pass --auto"),
    ):
        assert report.main(parser.parse_args([str(script), *options])) == 2
        assert words in capsys.readouterr().out
    assert report.main(parser.parse_args(["no.py", "--processes", "2"])) == 2
    assert "There is no file no.py" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parser.parse_args(["t.py", "--mesh", "2x4"])
    assert "such as 2,4, are expected" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["report", "--", "train.py"])
