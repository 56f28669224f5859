import threading

import pytest

from keras.src.backend.torch.distribution import modes as modes_lib
from keras.src.backend.torch.distribution.modes import modes

NAMES = [
    name
    for name in vars(modes_lib._Modes)
    if not name.startswith("_") and name != "calls"
]


def state():
    return {name for name in NAMES if getattr(modes, name)}


@pytest.mark.parametrize(
    "manager, expected",
    [
        (modes_lib.on_dtensors, {"on_dtensors"}),
        (modes_lib.on_whole_weights, {"whole"}),
        (modes_lib.on_plain_tensors, set()),
        (modes_lib.local_shards, {"local"}),
        (modes_lib.sharded_outputs, {"sharded_outputs"}),
        (modes_lib.stored_values, {"stored"}),
        (modes_lib.drawing_initial_values, {"drawing"}),
    ],
)
def test_sets_and_puts_back_after_an_exception(manager, expected):
    with pytest.raises(KeyError):
        with manager():
            assert state() == expected
            raise KeyError
    assert state() == set()


def test_the_innermost_layer_decides():
    with modes_lib.on_dtensors():
        with modes_lib.on_whole_weights():
            assert state() == {"whole"}
            with modes_lib.on_plain_tensors():
                assert state() == set()
            assert state() == {"whole"}
        assert state() == {"on_dtensors"}


def test_reading_leaves_the_layers_mode_alone():
    with modes_lib.on_dtensors(), modes_lib.stored_values():
        assert state() == {"on_dtensors", "stored"}


def test_threads_have_their_own():
    seen = []
    with modes_lib.local_shards():
        thread = threading.Thread(target=lambda: seen.append(state()))
        thread.start()
        thread.join()
    assert seen == [set()]
