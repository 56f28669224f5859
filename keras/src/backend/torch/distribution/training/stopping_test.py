import threading

from keras.src import layers
from keras.src import models
from keras.src.backend.torch.distribution.training import stopping


def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def make_model():
    return models.Sequential([layers.Dense(1)])


def test_another_thread_asks(no_world):
    model = make_model()

    def stop():
        model.stop_training = True

    with stopping.of_fit(model):
        in_a_thread(stop)
        # Not before all know.
        assert not model.stop_training
        assert stopping.is_wanted(model)
        stopping.agree(model, True)
        assert model.stop_training
        model.stop_training = False
        assert not stopping.is_wanted(model)
    # Nobody trains: it is a flag.
    in_a_thread(stop)
    assert model.stop_training


def test_the_thread_that_trains_sets_it(no_world):
    model = make_model()
    with stopping.of_fit(model):
        model.stop_training = True
        assert model.stop_training and stopping.is_wanted(model)


def test_what_is_asked_for_ends_with_fit(no_world):
    model = make_model()
    with stopping.of_fit(model):
        in_a_thread(lambda: setattr(model, "stop_training", True))
    assert not stopping.is_wanted(model)
