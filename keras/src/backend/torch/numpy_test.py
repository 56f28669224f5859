"""`repeat` where tensors have no numbers."""

import numpy as np
import pytest
import torch

from keras import ops
from keras.src.backend.torch.core import device_scope


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_repeat_on_meta_tensors(axis):
    x = np.arange(6.0).reshape(2, 3)
    with device_scope("meta"):
        shape = ops.repeat(torch.empty(2, 3, device="meta"), 2, axis).shape
    assert tuple(shape) == np.repeat(x, 2, axis).shape
    np.testing.assert_array_equal(ops.repeat(x, 2, axis), x.repeat(2, axis))
