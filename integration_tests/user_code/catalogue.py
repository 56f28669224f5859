"""All programs, by kind."""

from integration_tests.user_code import fixed
from integration_tests.user_code import layer_functions
from integration_tests.user_code import layers_of_layers
from integration_tests.user_code import losses
from integration_tests.user_code import losses_of_keras
from integration_tests.user_code import losses_of_pairs
from integration_tests.user_code import losses_of_torch
from integration_tests.user_code import metrics
from integration_tests.user_code import models
from integration_tests.user_code import running
from integration_tests.user_code import steps


def known(make_layer):
    """Of a function from a symbolic `(rows, UNITS)`, or a layer, made anew."""
    return lambda x: make_layer()(x)


def of_known(make_layer, rows):
    return running.of_layer(lambda: known(make_layer), rows)


# How a program is made of what a table has, and the table.
KINDS = {
    "sizes": (running.of_loss, losses.SIZES),
    "slices": (running.of_loss, losses.SLICES),
    "reductions": (running.of_loss, losses.REDUCTIONS),
    "numbers": (running.of_loss, losses.NUMBERS),
    "orders": (running.of_loss, losses.ORDERS),
    "pairs": (running.of_loss, losses_of_pairs.PAIRS),
    "losses of torch": (running.of_loss, losses_of_torch.LOSSES),
    "class losses": (running.of_class_loss, losses_of_torch.CLASSES),
    "functions of torch": (running.of_loss, losses_of_torch.FUNCTIONS),
    "moves": (running.of_loss, losses_of_torch.MOVES),
    "transforms": (running.of_loss, losses_of_keras.TRANSFORMS),
    "losses of keras": (running.of_loss, losses_of_keras.KERAS),
    "loss objects": (running.of_loss_object, losses_of_keras.OBJECTS),
    "loss objects alone": (
        running.of_unweighted_loss_object,
        losses_of_keras.ALONE,
    ),
    "statistics": (running.of_layer_function, layer_functions.STATISTICS),
    "mixed rows": (running.of_layer_function, layer_functions.MIXES),
    "values": (running.of_layer_function, layer_functions.VALUES),
    "state": (running.of_layer_function, layer_functions.STATE),
    "random numbers": (running.of_layer_function, layer_functions.RANDOM),
    "layers of layers": (running.of_layer, layers_of_layers.CALLING),
    "known layers": (of_known, layers_of_layers.KNOWN),
    "sequences": (running.of_sequence_layer, layers_of_layers.SEQUENCES),
    "short sequences": (
        running.of_short_sequence_layer,
        layers_of_layers.SEQUENCES,
    ),
    "models": (running.of_model_class, models.CALLS),
    "metric functions": (running.of_metric, metrics.FUNCTIONS),
    "metrics": (running.of_metric, metrics.CLASSES),
    "weighted metrics": (running.of_weighted_metric, metrics.WEIGHTED),
    "steps": (running.of_train_step, steps.STEPS),
    "losses of steps": (running.of_train_step, steps.OF_LOSSES),
    "logs of steps": (running.of_train_step, steps.OF_LOGS),
    "methods": (running.of_steps, models.METHODS),
    "callbacks": (running.of_callback, models.CALLBACKS),
    "fixed batches": (fixed.of_fixed, fixed.MIDDLES),
    "fixed batches, predicted": (fixed.of_predicted, fixed.PREDICTED),
}


def programs(kind, rows):
    """A dict from names to functions of a distribution."""
    make, table = KINDS[kind]
    return {name: make(entry, rows) for name, entry in table.items()}
