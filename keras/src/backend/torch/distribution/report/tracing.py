"""A model is called once, on tensors without memory: see `flow`."""

import contextlib

import torch

from keras.src import backend
from keras.src import tree
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import StatelessScope
from keras.src.backend.torch.distribution.mesh.context import logger
from keras.src.backend.torch.distribution.report import dry_run
from keras.src.backend.torch.distribution.report import flow as flow_lib


class _Meta(str):
    """The name of the device of tensors without memory, which Keras's own code
    does not know: there it would make up results of operators."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return other is self

    def __ne__(self, other):
        return other is not self


@contextlib.contextmanager
def _on_meta():
    before = global_state.get_global_attribute("torch_device", None)
    global_state.set_global_attribute("torch_device", _Meta("meta"))
    try:
        yield
    finally:
        global_state.set_global_attribute("torch_device", before)


def make(model, x=None):
    """A built model, without memory where it can be built so.

    Args:
        model: a model, or a function that makes one.
        x: a batch, for a model that its first call builds.

    Raises:
        ValueError: if it is not built, and cannot be.
    """
    if not dry_run.is_function(model):
        return _check_built(model)
    try:
        with dry_run.own_session(), backend.device_scope("meta"):
            return _built(model(), x)
    except Exception as error:
        # It asks for a number as it is built, or fails without this as well.
        logger.info(
            "The model takes its memory while a layout is looked for, as it "
            "cannot be built without: %s: %s",
            type(error).__name__,
            error,
        )
        with dry_run.own_session():
            return _built(model(), x)


def _built(model, x):
    if not model.built and x is not None:
        spec = tree.map_structure(
            lambda each: backend.KerasTensor(
                each.shape, backend.standardize_dtype(each.dtype)
            ),
            x,
        )
        backend.compute_output_spec(model, spec)
    return _check_built(model)


def _check_built(model):
    if not model.built:
        raise ValueError(
            "The model's variables are made by its first call. Pass `x`, a "
            "batch, and a function that makes the model; or a model that is "
            f"built. Received: model={model}"
        )
    return model


def trace(model, shards, rows=None, x=None):
    """Calls a model once.

    Args:
        model: a built model.
        shards: int, into how many parts weights would be cut.
        rows: int, of a batch of one data shard.
        x: a batch, where its shape is not known from the model.

    Returns:
        The `Flow`. Labels have the indices of the model's variables, each of
        them once.

    Raises:
        ValueError: if the model asks for numbers.
    """
    weights = list({id(v): v for v in model.variables}.values())
    flow = flow_lib.Flow(shards)
    mapping = []
    for index, v in enumerate(weights):
        value = v._value
        stand_in = torch.empty(tuple(v.shape), dtype=value.dtype, device="meta")
        if stand_in.is_floating_point() and stand_in.ndim:
            flow.add_weight(index, stand_in)
        mapping.append((v, stand_in))
    batch = dry_run.inputs_of(model, rows) if x is None else x
    batch = tree.map_structure(
        lambda each: torch.empty(
            each.shape if x is None else (rows, *each.shape[1:]),
            dtype=getattr(torch, backend.standardize_dtype(each.dtype)),
            device="meta",
        ),
        batch,
    )
    # Keras copies what it converts there, in the sight of `flow`.
    try:
        with torch.no_grad(), _on_meta(), flow:
            with StatelessScope(state_mapping=mapping):
                outputs = model(batch)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            "The model cannot be called on tensors without memory, as it asks "
            "for their numbers. Write its layout map by hand. Received: "
            f"model={model}"
        ) from error
    for out in tree.flatten(outputs):
        flow.output(out)
    return flow


def slots_of(model):
    """The variables of an optimizer like the model's, built; None if it has no
    optimizer."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or optimizer.built:
        return optimizer and optimizer.variables
    with dry_run.own_session(), backend.device_scope("meta"):
        if all(v._value.is_meta for v in model.trainable_variables):
            # Of a model that was made here: nobody else has it.
            optimizer.build(model.trainable_variables)
            return optimizer.variables
        like = type(optimizer).from_config(optimizer.get_config())
        like.build(
            [
                backend.Variable(torch.empty(tuple(v.shape), device="meta"))
                for v in model.trainable_variables
            ]
        )
        return like.variables
