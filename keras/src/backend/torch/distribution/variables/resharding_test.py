import threading

import torch

from keras.src.backend.torch.distribution.variables import resharding


def test_two_threads_put_back_what_torch_has():
    """Also where the first to come is the first to leave."""
    released = torch.autograd.graph.disable_saved_tensors_hooks
    entered, may_leave = threading.Event(), threading.Event()
    x, grads = torch.ones(2), []

    def transform():
        grads.append(torch.func.grad(lambda x: (x**2).sum())(x).tolist())

    def other():
        with resharding.saving_no_weights():
            entered.set()
            may_leave.wait(30)
            transform()

    thread = threading.Thread(target=other)
    with resharding.saving_no_weights():
        thread.start()
        entered.wait(30)
        transform()
        assert resharding._is_on()
    assert not resharding._is_on()
    may_leave.set()
    thread.join()
    assert grads == [[2.0, 2.0]] * 2
    assert torch.autograd.graph.disable_saved_tensors_hooks is released
