import numpy as np
import pytest
import torch

import keras
from keras.src.backend.common import keras_tensor
from keras.src.ops import concrete

SYMBOL = keras.KerasTensor((2,))
TENSOR = torch.ones(2)


@pytest.mark.parametrize(
    "args",
    [
        None,
        (),
        (TENSOR, 2, "same", None, True, 0.5),
        (TENSOR, (-1, 2, (3, None))),
        ([TENSOR, TENSOR],),
        (np.ones(2),),
        ({"x": TENSOR},),
        (SYMBOL,),
        (TENSOR, (1, SYMBOL)),
        ([TENSOR, [SYMBOL]],),
        ({"x": [SYMBOL]},),
        (keras.Variable(1.0),),
    ],
)
@pytest.mark.parametrize("kwargs", [None, {}, {"x": 1}, {"x": SYMBOL}])
def test_is_what_keras_says(args, kwargs):
    expected = keras_tensor.any_symbolic_tensors(args, kwargs)
    assert concrete.any_symbolic_tensors(args, kwargs) == expected


def test_operations_ask_it(monkeypatch):
    def fail(*args):
        raise AssertionError("Keras's own was asked")

    monkeypatch.setattr(concrete, "released", fail)
    x = keras.ops.reshape(TENSOR, (1, 2))
    x = keras.ops.relu(keras.ops.cast(x, "float16"))
    assert keras.ops.logsumexp(x).shape == ()
