"""Layout maps that are found."""

import re

import numpy as np
import pytest

import keras
from keras import layers
from keras.src.distribution import auto_layout
from keras.src.distribution import layout_keys
from keras.src.distribution import layout_search

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="it is there for torch alone"
)


@pytest.fixture(autouse=True)
def new_session(no_world):
    keras.utils.clear_session(free_memory=False)


def mesh(shape=(2, 2), names=("batch", "model")):
    count = 1
    for n in shape:
        count *= n
    devices = [f"cpu:{i}" for i in range(count)]
    return keras.distribution.DeviceMesh(shape, names, devices)


def mlp(widths=(64, 16, 64, 16)):
    model = keras.Sequential([keras.Input((16,))])
    for i, n in enumerate(widths):
        model.add(layers.Dense(n, "relu", name=f"layer_{i}"))
    model.compile("adam", "mse")
    return model


def axes(layout_map):
    return {key: layout_map[key].axes for key in layout_map}


def test_columns_and_rows_in_turn():
    found = keras.distribution.LayoutMap.auto(mlp, mesh(), 8)
    model = mlp()
    cut = {
        v.path.split("/", 1)[1]: found[v.path].axes
        for v in model.variables
        if found[v.path] is not None
    }
    assert cut == {
        "layer_0/kernel": (None, "model"),
        "layer_0/bias": ("model",),
        "layer_1/kernel": ("model", None),
        "layer_2/kernel": (None, "model"),
        "layer_2/bias": ("model",),
        "layer_3/kernel": ("model", None),
    }
    assert "over model: a process holds" in found.explanation
    assert "runner-up:" in found.explanation


def check_code(found, mesh):
    """Its code makes it."""
    names = {"keras": keras, "mesh": mesh}
    assert str(found) == found.code
    exec(found.code, names)
    made = names["layout_map"]
    assert axes(made) == axes(found) != {}
    assert (made.device_mesh.devices == found.device_mesh.devices).all()
    assert made.device_mesh.shape == found.device_mesh.shape


def test_its_code_makes_it():
    check_code(keras.distribution.LayoutMap.auto(mlp, mesh(), 8), mesh())


SEVERAL = ("batch", "model", "expert")


def report_of(make, found):
    """Bytes that a process sends over each axis in a step, by a dry run."""
    keras.utils.clear_session(free_memory=False)
    distribution = keras.distribution.ModelParallel(
        layout_map=found, batch_dim_name="batch"
    )
    report = keras.distribution.report(make, 8, distribution=distribution)
    sent = {}
    for c in report.facts["collectives"]:
        sent[c["axes"]] = sent.get(c["axes"], 0) + c["sent"]
    held = sum(v["stored"] for v in report.facts["variables"])
    return sent, held


def test_several_model_axes_are_joined():
    for names in (SEVERAL, ("model", "batch", "expert")):
        of_three = mesh((2, 2, 2), names)
        arguments = {"batch_dim_name": "batch"}
        found = auto_layout.find(mlp, of_three, 8, **arguments)
        assert found.mesh.axis_names == ["batch", "model_expert"]
        assert found.mesh.shape == (2, 4)
        sent, held = report_of(
            mlp,
            keras.distribution.LayoutMap.auto(mlp, of_three, 8, **arguments),
        )
        assert found.sent == {"model_expert": sent["model_expert"]}
        assert f"holds {held / 1024:.1f} KiB" in found.explanation
        assert "why not each by itself: a process would" in found.explanation
        check_code(
            keras.distribution.LayoutMap.auto(mlp, of_three, 8, **arguments),
            of_three,
        )
    devices = found.mesh.devices[0].tolist()
    assert devices == ["cpu:0", "cpu:1", "cpu:4", "cpu:5"]


def test_several_model_axes_that_cut_dims_of_their_own():
    def make():
        return mlp((10, 6, 10, 6))

    of_three = mesh((2, 2, 2), SEVERAL)
    found = auto_layout.find(make, of_three, 8)
    assert found.mesh is of_three
    used = {name for cut in found.keys.values() for name in cut}
    assert used == {"model", "expert"}
    sent, held = report_of(
        make, keras.distribution.LayoutMap.auto(make, of_three, 8)
    )
    assert found.sent == {name: sent[name] for name in SEVERAL[1:]}
    assert f"holds {held} B" in found.explanation
    assert "why not as one axis: a process would hold" in found.explanation


def test_an_axis_that_cuts_nothing_is_said():
    def make():
        return mlp((9, 6, 9, 6))

    with pytest.warns(UserWarning, match=r"expert \(2\) cuts nothing"):
        found = keras.distribution.LayoutMap.auto(
            make, mesh((2, 2, 2), SEVERAL), 8
        )
    assert 'batch_dim_name=("batch", "expert")' in found.explanation


def test_a_model_that_is_built_stays_what_it_is():
    model = mlp()
    before = [v.numpy().copy() for v in model.variables]
    found = keras.distribution.LayoutMap.auto(model, mesh(), 8)
    assert axes(found)
    for v, value in zip(model.variables, before):
        assert (v.numpy() == value).all()
    assert mlp().name == "sequential_1"
    # A function's names are those that its next model has.
    keras.distribution.LayoutMap.auto(mlp, mesh(), 8)
    assert mlp().name == "sequential_2"


def test_what_does_not_divide_is_whole():
    def make():
        model = keras.Sequential([keras.Input((15,))])
        for n in (10, 7, 9):
            model.add(layers.Dense(n))
        return model

    with pytest.warns(UserWarning, match=r"model \(4\) cuts nothing"):
        found = keras.distribution.LayoutMap.auto(make, mesh((1, 4)), 8)
    assert not axes(found)


def test_repeated_blocks_share_a_key():
    def make():
        x = inputs = keras.Input((16,))
        for i in range(12):
            h = layers.LayerNormalization(name=f"block_{i}_norm")(x)
            h = layers.Dense(32, "gelu", name=f"block_{i}_up")(h)
            x = layers.Add()([x, layers.Dense(16, name=f"block_{i}_down")(h)])
        return keras.Model(inputs, x)

    found = axes(keras.distribution.LayoutMap.auto(make, mesh(), 8))
    assert found == {
        r"block_\d+_up/kernel": (None, "model"),
        r"block_\d+_up/bias": ("model",),
        r"block_\d+_down/kernel": ("model", None),
    }


def test_layers_that_keras_names():
    def make():
        model = keras.Sequential([keras.Input((32,))])
        for _ in range(6):
            model.add(layers.Dense(32, "relu"))
        return model

    found = axes(keras.distribution.LayoutMap.auto(make, mesh(), 8))
    assert found == {
        "sequential/dense(_1|_3|_5)/kernel": ("model", None),
        "sequential/dense(|_2|_4)/kernel": (None, "model"),
        "sequential/dense(|_2|_4)/bias": ("model",),
    }


def test_a_budget():
    whole = sum(v.value.nbytes for v in mlp().trainable_variables)

    def find(budget=None, shape=(2, 2)):
        keras.utils.clear_session(free_memory=False)
        return keras.distribution.LayoutMap.auto(
            mlp, mesh(shape), 8, budget=budget
        )

    # Four times the weights with Adam, of which a half is on a process.
    found = find(whole * 1.5)
    assert "(FSDP)" in found.explanation
    assert "It does not fit" not in found.explanation
    assert any("batch" in cut for cut in axes(found).values())
    assert not any("batch" in cut for cut in axes(find()).values())
    assert axes(find(whole * 9)) == axes(find())
    assert "It does not fit, by" in find(100).explanation
    # Without a model axis it is FSDP alone.
    data = axes(find(100, (4, 1)))
    assert {n for cut in data.values() for n in cut} == {None, "batch"}


def test_keys_that_numbers_tell_apart():
    paths = ["m/dense_1/kernel", "m/dense_2/kernel", "m/dense_3/kernel"]

    class Weight:
        def __init__(self, path):
            self.path = path

    cuts = [[None, "model"], ["model", None], [None, "model"]]
    keys = layout_keys.keys_of([Weight(p) for p in paths], cuts)
    for path, cut in zip(paths, cuts):
        matched = [key for key in keys if re.fullmatch(key, path)]
        assert [keys[key] for key in matched] == [tuple(cut)]
    for paths, common, alone in (
        (["a_1/x_2", "a_3/x_2"], r"a_\d+/x_2", "a(_1|_3)/x_2"),
        (["a/x", "a_3/x"], r"a(_\d+)?/x", "a(|_3)/x"),
        (["b1/x", "b12/x"], r"b\d+/x", "b(1|12)/x"),
        (["m_0/a/k", "m_1/a_1/k"], r"m_\d+/a(_\d+)?/k", "m_0/a/k|m_1/a_1/k"),
        (["a-b/x"], "a-b/x", "a-b/x"),
        (["s0_b1_2_c/k", "s1_b2_1_c/k"], r"s\d+_b\d+_\d+_c/k", None),
        (["b1_2/x", "b_1/x"], r"b[_\d]+/x", "b(1_2|_1)/x"),
    ):
        assert layout_keys.common_pattern(paths) == common
        alone = alone or "|".join(paths)
        assert layout_keys.common_pattern(paths, any_number=False) == alone


def test_many_choices_are_descended():
    choices = [[None, 0, 1]] * 12

    def cost(dims):
        # Alternating dims are best.
        return sum(
            3 * (d is None) + (d == e) for d, e in zip(dims, [*dims[1:], None])
        )

    value, dims = min(layout_search._descents(choices, cost))
    assert None not in dims and value <= 1


class Own(keras.Model):
    def __init__(self, asks=False):
        super().__init__()
        self.up = layers.Dense(32, "relu", name="up")
        self.down = layers.Dense(16, name="down")
        self.asks = asks

    def call(self, x):
        if self.asks and float(x[0, 0]) > 1:
            x = 2 * x
        return self.down(self.up(x))


def test_models_that_their_first_call_builds():
    x = np.ones((8, 16), "float32")
    found = keras.distribution.LayoutMap.auto(Own, mesh(), x=x)
    assert list(axes(found).values()) == [
        (None, "model"),
        ("model",),
        ("model", None),
    ]
    with pytest.raises(ValueError, match="made by its first call"):
        keras.distribution.LayoutMap.auto(Own(), mesh(), x=x)
    model = Own(asks=True)
    model(x)
    with pytest.raises(ValueError, match="asks for their numbers"):
        keras.distribution.LayoutMap.auto(model, mesh(), x=x)
    # Nothing of a failed trace is left.
    assert model(x).shape == (8, 16)
