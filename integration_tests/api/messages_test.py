"""What a program says appears once, from process 0."""

import numpy as np
import pytest

import keras
from integration_tests.harness import everyone
from integration_tests.harness import parity

pytestmark = pytest.mark.world(2)


def make_model():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(6, name="up")]
    )
    model.compile("sgd", loss="mse", metrics=["mae"])
    return model


def distributions():
    yield keras.distribution.DataParallel()
    yield parity.model_parallel((1, 2), {".*kernel": (None, "model")})


def said(capsys):
    """What each process wrote since the last call, by rank."""
    return everyone.gather(capsys.readouterr().out)


@pytest.mark.parametrize("verbose", ["auto", 1, 2])
def test_progress_appears_once(verbose, capsys):
    x, y = np.ones((5, 4)), np.ones((5, 6))
    for distribution in distributions():
        with distribution.scope():
            model = make_model()
            model.fit(
                x,
                y,
                batch_size=2,
                epochs=2,
                verbose=verbose,
                validation_data=(x, y),
            )
            first, second = said(capsys)
            assert first.count("Epoch 1/2") == 1
            assert first.count("Epoch 2/2") == 1
            assert "val_mae" in first
            assert second == ""

            model.evaluate(x, y, verbose=verbose)
            first, second = said(capsys)
            assert "mae" in first
            assert second == ""

            model.predict(x, verbose=verbose)
            first, second = said(capsys)
            assert "1/1" in first
            assert second == ""


def test_print_msg_appears_once(capsys):
    from keras.src.utils import io_utils

    io_utils.print_msg("a message")
    assert said(capsys) == ["a message\n", ""]


def test_messages_of_keras_appear_once(capsys):
    x, y = np.ones((5, 4)), np.ones((5, 6))
    with keras.distribution.DataParallel().scope():
        model = make_model()
        model.summary()
        first, second = said(capsys)
        assert first.count("Total params") == 1
        assert second == ""

        # No step is large enough for it.
        callback = keras.callbacks.EarlyStopping(
            monitor="loss", min_delta=1e9, patience=1, verbose=1
        )
        model.fit(x, y, epochs=3, verbose=0, callbacks=[callback])
        first, second = said(capsys)
        assert first.count("early stopping") == 1
        assert second == ""


def test_what_the_program_prints_appears_on_each(capsys, rank):
    print("rank", rank)
    assert said(capsys) == ["rank 0\n", "rank 1\n"]
