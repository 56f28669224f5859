"""Files are written from pieces that one process is sent, and read in slices;
they are one device's files."""

import io
import zipfile

import h5py
import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity
from keras import layers
from keras.src.backend.torch.distribution.variables import streams
from keras.src.distribution import slices

pytestmark = [pytest.mark.world(2, 4), pytest.mark.limit(60)]


class Kinds(layers.Layer):
    """Weights of some dtypes, one of them smaller than the mesh."""

    dtypes = ("bfloat16", "float16", "int8", "bool", "float64")

    def build(self, input_shape):
        for i, dtype in enumerate(self.dtypes):
            self.add_weight(
                shape=(i + 3, 10),
                dtype=dtype,
                initializer=lambda shape, dtype: keras.ops.cast(
                    keras.ops.reshape(keras.ops.arange(30), (3, 10)) % 2
                    if shape == (3, 10)
                    else keras.ops.ones(shape),
                    dtype,
                ),
                trainable=False,
                name=f"kind_{dtype}",
            )

    def call(self, x):
        return x


class Own(layers.Dense):
    """A layer that does what it likes with what it loads."""

    def load_own_variables(self, store):
        assert type(store["0"]) is np.ndarray
        kernel = store["0"]
        kernel *= 2
        self._kernel.assign(kernel)
        self.bias.assign(store["1"] + 1)


OBJECTS = {"Kinds": Kinds, "Own": Own}


def make_model(kind=layers.Dense):
    model = keras.Sequential(
        [
            keras.Input((13,)),
            layers.Embedding(11, 7, name="words"),
            layers.Flatten(),
            kind(24, name="up", bias_initializer="random_normal"),
            Kinds(name="kinds"),
            layers.Dense(3, name="down"),
        ],
        name="model",
    )
    model.compile(keras.optimizers.Adam(0.1), "mse")
    return model


def mesh(shape, permuted=False):
    devices = keras.distribution.list_devices()
    if permuted:
        devices = devices[::-1]
    return keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)


def distributions(world_size):
    square = (2, 2) if world_size == 4 else (1, 2)
    both = {
        ".*embeddings": (("model", "batch"), None),
        ".*up.*kernel": ("batch", "model"),
        ".*up.*bias": ("model",),
        ".*down.*kernel": (("batch", "model"), None),
        ".*kind.*": ("model", None),
    }
    yield (
        "fsdp",
        keras.distribution.ModelParallel(
            layout_map=parity.layout_map(
                mesh((world_size, 1)),
                {".*(kernel|embed|kind).*": ("batch", None)},
            ),
            batch_dim_name="batch",
        ),
    )
    for permuted in (False, True):
        yield (
            f"both, permuted={permuted}",
            keras.distribution.ModelParallel(
                layout_map=parity.layout_map(mesh(square, permuted), both),
                batch_dim_name="batch",
            ),
        )
    yield "data", keras.distribution.DataParallel()


def data():
    rng = np.random.default_rng(2)
    x = rng.integers(0, 11, (6, 13)).astype("int32")
    return x, rng.standard_normal((6, 3)).astype("float32")


def trained():
    keras.utils.set_random_seed(3)
    model = make_model()
    model.fit(*data(), verbose=0)
    return model


def numbers(model):
    """All that a file keeps of a model, the optimizer's too."""
    variables = model.variables
    return [keras.ops.convert_to_numpy(v) for v in variables]


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def tree(file):
    """What an HDF5 file holds, and how."""
    found = {}

    def visit(name, item):
        found[name] = sorted((k, str(v)) for k, v in item.attrs.items())
        if isinstance(item, h5py.Dataset):
            plan = item.id.get_create_plist()
            found[name] += [
                item.shape,
                str(item.dtype),
                plan.get_layout(),
                plan.get_nfilters(),
                item[()].tobytes(),
            ]

    with h5py.File(file, "r") as opened:
        opened.visititems(visit)
    return found


def tree_of_archive(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = sorted(archive.namelist())
        return names, tree(io.BytesIO(archive.read("model.weights.h5")))


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 100)


def save_all(model, folder):
    model.save(folder / "m.keras")
    model.save_weights(folder / "m.weights.h5")
    model.save_weights(folder / "m.weights.json", max_shard_size=1e-5)


def test_files_are_those_of_one_device(
    world_size, rank, tmp_path, small_pieces
):
    for name, distribution in distributions(world_size):
        folder, own = tmp_path / name, tmp_path / f"{rank}-{name}"
        own.mkdir()
        if rank == 0:
            folder.mkdir()
        everyone.gather(None)
        with distribution.scope():
            model = trained()
            expected = numbers(model)
            save_all(model, folder)
            weights = model.get_weights()
        # Without a distribution, released Keras reads them.
        alone = keras.models.load_model(folder / "m.keras", OBJECTS)
        assert_equal(numbers(alone), expected)
        # And writes the same.
        save_all(alone, own)
        assert tree_of_archive(folder / "m.keras") == tree_of_archive(
            own / "m.keras"
        )
        names = sorted(path.name for path in own.iterdir())
        assert names == sorted(path.name for path in folder.iterdir())
        for each in names:
            if each.endswith(".h5"):
                assert tree(folder / each) == tree(own / each), each
            elif each.endswith(".json"):
                assert (folder / each).read_text() == (own / each).read_text()
        for each in ("m.weights.h5", "m.weights.json", "m.keras"):
            alone.set_weights([np.zeros_like(w) for w in weights])
            alone.load_weights(folder / each)
            assert_equal(alone.get_weights(), weights)


def test_they_load_on_any_mesh(world_size, rank, tmp_path):
    with keras.distribution.DataParallel().scope():
        model = trained()
        expected, weights = numbers(model), model.get_weights()
        save_all(model, tmp_path)
    # Somebody has compressed it.
    if rank == 0:
        with (
            zipfile.ZipFile(tmp_path / "m.keras") as archive,
            zipfile.ZipFile(
                tmp_path / "deflated.keras", "w", zipfile.ZIP_DEFLATED
            ) as other,
        ):
            for each in archive.namelist():
                other.writestr(each, archive.read(each))
    everyone.gather(None)
    for _, distribution in distributions(world_size):
        with distribution.scope():
            for each in ("m.keras", "deflated.keras"):
                loaded = keras.models.load_model(tmp_path / each, OBJECTS)
                assert_equal(numbers(loaded), expected)
            for each in ("m.weights.h5", "m.weights.json", "m.keras"):
                loaded.set_weights([np.zeros_like(w) for w in weights])
                loaded.load_weights(tmp_path / each)
                assert_equal(loaded.get_weights(), weights)
            # Their steps go on alike, and are compared.
            loaded.fit(*data(), verbose=0)


def test_each_process_reads_its_slices(world_size, tmp_path, monkeypatch):
    """And nobody reads the whole, where all is cut."""
    read = []
    released = slices.Opened.read_at

    def read_at(self, offset, buffer):
        read.append(memoryview(buffer).nbytes)
        released(self, offset, buffer)

    monkeypatch.setattr(slices.Opened, "read_at", read_at)
    for axes in (("batch", None), (None, "batch")):
        distribution = parity.model_parallel(
            (world_size, 1), {".*kernel": axes}
        )
        with distribution.scope():
            model = keras.Sequential(
                [keras.Input((300,)), layers.Dense(400, use_bias=False)]
            )
            model.save(tmp_path / "m.keras")
            model.save_weights(tmp_path / "m.weights.h5")
            for each in ("m.keras", "m.weights.h5"):
                size = (tmp_path / each).stat().st_size
                read.clear()
                model.load_weights(tmp_path / each)
                total = everyone.gather(sum(read))
                assert sum(total) <= 1.2 * size, (each, total, size)
                assert max(total) <= 1.2 * size / world_size
            everyone.gather(None)


def test_code_of_ones_own_loads_arrays(world_size, tmp_path):
    expected = None
    for _, distribution in distributions(world_size):
        with distribution.scope():
            keras.utils.set_random_seed(3)
            model = make_model(Own)
            before = model.get_layer("up").get_weights()
            model.save_weights(tmp_path / "m.weights.h5")
            model.load_weights(tmp_path / "m.weights.h5")
            kernel, bias = model.get_layer("up").get_weights()
            np.testing.assert_array_equal(kernel, 2 * before[0])
            np.testing.assert_array_equal(bias, before[1] + 1)
        expected = expected or before
        assert_equal(before, expected)
        everyone.gather(None)


def test_another_shape_is_an_error(world_size, tmp_path):
    for _, distribution in distributions(world_size):
        with distribution.scope():
            model = make_model()
            model.save_weights(tmp_path / "m.weights.h5")
            other = keras.Sequential(
                [
                    keras.Input((13,)),
                    layers.Embedding(12, 7, name="words"),
                    *(make_model().layers[1:]),
                ]
            )
            outcomes = everyone.outcomes(
                lambda: other.load_weights(tmp_path / "m.weights.h5")
            )
            assert all("must match" in outcome for outcome in outcomes)
