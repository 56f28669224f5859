import threading

import pytest

from keras.src.backend.torch.distribution import modes as modes_lib
from keras.src.backend.torch.distribution.modes import Shows
from keras.src.backend.torch.distribution.modes import modes

NAMES = [name for name in vars(modes_lib._Modes) if not name.startswith("_")]
USUAL = {name: getattr(modes, name) for name in NAMES}


def state():
    return {
        name: getattr(modes, name)
        for name in NAMES
        if getattr(modes, name) != USUAL[name]
    }


@pytest.mark.parametrize(
    "manager, expected",
    [
        (modes_lib.on_dtensors, {"shows": Shows.DTENSORS}),
        (modes_lib.on_whole_weights, {"shows": Shows.WHOLE}),
        (modes_lib.on_plain_tensors, {}),
        (modes_lib.local_shards, {"shows": Shows.LOCAL}),
        (modes_lib.sharded_outputs, {"sharded_outputs": True}),
        (modes_lib.handing_shards, {"on_shards": True}),
        (modes_lib.stored_values, {"shows": Shows.STORED}),
        (modes_lib.drawing_initial_values, {"drawing": True}),
    ],
)
def test_sets_and_puts_back_after_an_exception(manager, expected):
    with pytest.raises(KeyError):
        with manager():
            assert state() == expected
            raise KeyError
    assert state() == {}


def test_the_innermost_layer_decides():
    with modes_lib.on_dtensors():
        with modes_lib.on_whole_weights():
            assert state() == {"shows": Shows.WHOLE}
            with modes_lib.on_plain_tensors():
                assert state() == {}
            assert state() == {"shows": Shows.WHOLE}
        assert state() == {"shows": Shows.DTENSORS}


def test_reading_leaves_the_layers_mode_alone():
    with modes_lib.on_dtensors():
        with modes_lib.stored_values():
            assert state() == {"shows": Shows.STORED}
        assert state() == {"shows": Shows.DTENSORS}


def test_threads_have_their_own():
    seen = []
    with modes_lib.local_shards():
        thread = threading.Thread(target=lambda: seen.append(state()))
        thread.start()
        thread.join()
    assert seen == [{}]


def test_what_is_swapped_is_put_back():
    """Also where it is swapped twice, written into, or an error passes."""

    class Place:
        a, b = 1, 2

    place = Place()
    with pytest.raises(ZeroDivisionError):
        with modes_lib.swapped([(place, "a", 3), (Place, "b", 4)]):
            with modes_lib.swapped(iter([(place, "a", 5)])):
                assert (place.a, place.b) == (5, 4)
                place.a = 6
            assert place.a == 3
            raise ZeroDivisionError
    assert (place.a, Place.b) == (1, 2)
