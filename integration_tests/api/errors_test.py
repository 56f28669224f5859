"""What is wrong is said by every process, and none is left waiting."""

import warnings

import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity

pytestmark = [pytest.mark.world(2), pytest.mark.limit(30)]


def assert_all_say(function, *parts):
    """Asserts that a call fails on every process, with each of the parts.

    Collective: every process calls it.
    """
    for outcome in everyone.outcomes(function):
        assert "Error: " in outcome
        for part in parts:
            assert part in outcome


def make_model(widths=(6, 4)):
    model = keras.Sequential(
        [
            keras.Input((8,)),
            *(
                keras.layers.Dense(width, name=f"dense{i}")
                for i, width in enumerate(widths)
            ),
        ],
        name="model",
    )
    model.compile("sgd", loss="mse")
    return model


def fit(model):
    x, y = np.ones((5, 8), "float32"), np.ones((5, 4), "float32")
    model.fit(x, y, verbose=0)


def device_mesh(shape=(1, 2), devices=None):
    return keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)


@pytest.mark.parametrize(
    "shape, product",
    [((2, 2), "batch 2 x model 2 = 4"), ((1, 1), "batch 1 x model 1 = 1")],
)
def test_size_of_the_mesh(shape, product):
    devices = [f"cpu:{i}" for i in range(shape[0] * shape[1])]
    mesh = device_mesh(shape, devices)

    def use():
        layout_map = parity.layout_map(mesh, {".*kernel": (None, "model")})
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layout_map)
        )

    assert_all_say(use, product, "number of processes is 2", "torchrun")
    assert keras.distribution.distribution() is None


def test_mesh_that_holds_a_process_twice():
    mesh = device_mesh((1, 2), ["cpu:0", "cpu:0"])
    assert_all_say(lambda: mesh.backend_mesh, "each process", "cpu:0")


def test_axis_that_the_mesh_lacks():
    assert_all_say(
        lambda: parity.model_parallel((1, 2), {".*kernel": (None, "modle")}),
        "'modle'",
        "'model'",
    )
    assert_all_say(
        lambda: parity.model_parallel((1, 2), {}, batch="rows"),
        "batch_dim_name='rows'",
        "['batch', 'model']",
    )


def test_axis_that_the_mesh_lacks_in_a_layout_of_a_variable():
    # A layout without a mesh is not checked before it is used.
    layout = keras.distribution.TensorLayout((None, "modle"))
    with parity.model_parallel((1, 2), {}).scope():
        assert_all_say(
            lambda: keras.Variable(np.ones((4, 4)), layout=layout, name="own"),
            "'own'",
            "'modle'",
            "['batch', 'model']",
        )


def test_layout_with_too_many_dims():
    layouts = {".*bias": (None, "model")}
    with parity.model_parallel((1, 2), layouts).scope():
        assert_all_say(
            make_model,
            "dense0/bias",
            "2 entries for 1 dims",
            "(None, 'model')",
            "shape=(6,)",
        )


def test_axis_for_two_dims():
    layouts = {".*kernel": ("model", "model")}
    with parity.model_parallel((1, 2), layouts).scope():
        assert_all_say(make_model, "dense0/kernel", "'model' twice")


def test_layout_map_of_another_mesh():
    layout_map = parity.layout_map(device_mesh((1, 2)), {})
    assert_all_say(
        lambda: keras.distribution.ModelParallel(
            layout_map=layout_map, device_mesh=device_mesh((2, 1))
        ),
        "another mesh",
        "shape=(2, 1)",
        "shape=(1, 2)",
    )


def test_layout_of_another_mesh():
    layout = keras.distribution.TensorLayout(
        (None, "model"), device_mesh((2, 1))
    )
    with parity.model_parallel((1, 2), {".*kernel": layout}).scope():
        assert_all_say(
            make_model,
            "dense0/kernel",
            "another mesh",
            "shape=(2, 1)",
            "shape=(1, 2)",
        )


@pytest.mark.parametrize("step", ["fit", "predict", "train_on_batch"])
def test_distribution_set_after_the_model_was_built(step):
    model = make_model()
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    x, y = np.ones((5, 8), "float32"), np.ones((5, 4), "float32")
    calls = {
        "fit": lambda: model.fit(x, y, verbose=0),
        "predict": lambda: model.predict(x, verbose=0),
        "train_on_batch": lambda: model.train_on_batch(x, y),
    }
    assert_all_say(
        calls[step],
        "built before the distribution was set",
        "dense0/kernel",
        "dense1/bias",
        "`keras.distribution.set_distribution`",
        "before you build the model",
    )


def test_model_of_another_distribution():
    with keras.distribution.DataParallel().scope():
        model = make_model()
    layouts = {".*kernel": (None, "model")}
    with parity.model_parallel((1, 2), layouts).scope():
        assert_all_say(lambda: fit(model), "another one", "dense0/kernel")


@pytest.mark.parametrize(
    "device, message",
    [
        ("cpu:7", "the last one is 'cpu:1'"),
        ("abacus:0", "Available types: ['cpu'"),
        ("cpu:x", "Device not found: cpu:x"),
    ],
)
def test_device_that_does_not_exist(device, message):
    mesh = device_mesh((1, 2), ["cpu:0", device])
    assert_all_say(lambda: mesh.backend_mesh, device, message)


def test_device_type_that_does_not_exist():
    assert_all_say(
        lambda: keras.distribution.list_devices("abacus"),
        "no device of type 'abacus'",
        "'cpu'",
    )


@pytest.mark.parametrize("layouts", [None, {".*kernel": (None, "model")}])
def test_weights_that_differ(layouts, rank):
    if layouts is None:
        distribution = keras.distribution.DataParallel()
    else:
        distribution = parity.model_parallel((1, 2), layouts)
    with distribution.scope():
        keras.utils.set_random_seed(rank)
        model = make_model()
        assert_all_say(
            lambda: fit(model),
            "model/dense0/kernel" if layouts is None else "dense0/kernel",
            "`keras.utils.set_random_seed`",
        )


@pytest.mark.parametrize("layouts", [None, {".*kernel": (None, "model")}])
def test_different_numbers_of_layers(layouts, rank):
    if layouts is None:
        distribution = keras.distribution.DataParallel()
    else:
        distribution = parity.model_parallel((1, 2), layouts)
    with distribution.scope():
        model = make_model((6, 4) if rank else (6, 6, 4))
        assert_all_say(
            lambda: fit(model),
            "same model",
            "number of variables: 6 on process 0; 4 on process 1",
        )


def test_different_widths_of_layers(rank):
    with keras.distribution.DataParallel().scope():
        model = make_model((6 + rank, 4))
        assert_all_say(
            lambda: fit(model),
            "dense0, units: 6 on process 0; 7 on process 1",
        )


def test_seeds_that_differ(rank):
    keras.utils.set_random_seed(40 + rank)

    # Process 0 is the one that the others are compared with.
    outcome = everyone.outcomes(keras.distribution.initialize)[rank]
    assert (outcome == "done") == (rank == 0)
    if rank:
        assert "seed 41 on process 1, 40 on process 0" in outcome


@pytest.mark.parametrize("key, hint", [("dense.*kernel", True), ("x", False)])
def test_key_that_matches_nothing(key, hint):
    layouts = {key: (None, "model"), ".*dense1/kernel": (None, "model")}
    with parity.model_parallel((1, 2), layouts).scope():
        model = make_model()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(model)
            fit(model)
    messages = [
        str(warning.message)
        for warning in caught
        if "of the layout map matches" in str(warning.message)
    ]
    # Once, from process 0.
    first, second = everyone.gather(messages)
    assert len(first) == 1
    assert second == []
    assert f"'{key}'" in first[0]
    assert "model/dense0/kernel" in first[0]
    assert (f"'.*{key}.*' would" in first[0]) == hint


@pytest.mark.parametrize("layout", [("model",), (None, None, "model")])
def test_layout_of_another_number_of_dims(layout):
    with parity.model_parallel((1, 2), {".*dense1/kernel": layout}).scope():
        assert_all_say(
            make_model,
            "'.*dense1/kernel'",
            str(layout),
            "path='model/dense1/kernel'",
            "shape=(6, 4)",
        )


def test_key_of_another_model_is_no_fault():
    # Models that are trained in turns have one layout map.
    layouts = {f".*dense{i}/kernel": (None, "model") for i in range(4)}
    with parity.model_parallel((1, 2), layouts).scope():
        models = make_model((6, 4)), make_model((6, 4, 6, 4))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for model in models:
                x, y = np.ones((5, 8), "float32"), np.ones((5, 4), "float32")
                model.fit(x, y, verbose=0)
    assert not [w for w in caught if "layout map" in str(w.message)]


@pytest.mark.parametrize("key", ["dense0/output", ".*dense9/output"])
def test_output_key_without_effect(key):
    layouts = {
        key: ("batch", "model"),
        ".*/dense1/output": (None, "model"),
    }
    with parity.model_parallel((1, 2), layouts).scope():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                fit(make_model())
    messages = [
        str(w.message) for w in caught if "has no effect" in str(w.message)
    ]
    # Once, from process 0.
    first, second = everyone.gather(messages)
    assert len(first) == 1 and second == []
    assert f"'{key}'" in first[0]


def test_orbax_checkpoint():
    with keras.distribution.DataParallel().scope():
        assert_all_say(
            lambda: keras.callbacks.OrbaxCheckpoint("some/folder"),
            "ShardedCheckpoint",
            "ModelCheckpoint",
            "some/folder",
        )


def test_error_of_a_layer_is_its_own():
    # It is tried on shards, then whole: what is shown is the layer's error.
    class Wrong(keras.layers.Dense):
        def call(self, inputs):
            raise KeyError("of the layer")

    layouts = {".*kernel": (None, "model")}
    with parity.model_parallel((1, 2), layouts).scope():
        layer = Wrong(4)
        layer.build((None, 8))
        for outcome in everyone.outcomes(lambda: layer(np.ones((2, 8)))):
            assert "of the layer" in outcome
