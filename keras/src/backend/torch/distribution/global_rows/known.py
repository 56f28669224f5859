"""Which code is Keras's own and knows about rows: a closed list.

Everything that is not on it is user code, and sees the global batch. What is on
it is called by exact class, with no function of the user's in it, and is handed
local rows alone: each row's outputs depend on that row, or it asks for what it
needs of the others (`statistics`). `catalogue_test` and `losses_test` prove it,
class by class.
"""

import functools
import inspect
import types
import weakref

from keras.src import tree
from keras.src.backend.torch.distribution.mesh.context import current

LAYERS = """
    Activation ELU LeakyReLU PReLU ReLU Softmax AdditiveAttention Attention
    GroupQueryAttention MultiHeadAttention Conv1D Conv1DTranspose Conv2D
    Conv2DTranspose Conv3D Conv3DTranspose DepthwiseConv1D DepthwiseConv2D
    SeparableConv1D SeparableConv2D Dense EinsumDense Embedding Identity
    InputLayer Masking ReversibleEmbedding Add Average Concatenate Dot Maximum
    Minimum Multiply Subtract BatchNormalization GroupNormalization
    LayerNormalization RMSNormalization SpectralNormalization UnitNormalization
    AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D
    AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D
    AveragePooling1D AveragePooling2D AveragePooling3D GlobalAveragePooling1D
    GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D
    GlobalMaxPooling2D GlobalMaxPooling3D MaxPooling1D MaxPooling2D MaxPooling3D
    CategoryEncoding Discretization AugMix AutoContrast
    CenterCrop ContrastLimitedAdaptiveHistogramEqualization Equalization
    RandAugment RandomBrightness RandomColorDegeneration RandomColorJitter
    RandomContrast RandomCrop RandomElasticTransform RandomErasing RandomFlip
    RandomGaussianBlur RandomGrayscale RandomHue RandomInvert RandomPerspective
    RandomPosterization RandomRotation RandomSaturation RandomSharpness
    RandomShear RandomTranslation RandomZoom Resizing Solarization
    Normalization Rescaling STFTSpectrogram
    AlphaDropout Dropout GaussianDropout GaussianNoise SpatialDropout1D
    SpatialDropout2D SpatialDropout3D Cropping1D Cropping2D Cropping3D Flatten
    Permute RepeatVector Reshape UpSampling1D UpSampling2D UpSampling3D
    ZeroPadding1D ZeroPadding2D ZeroPadding3D Bidirectional ConvLSTM1D
    ConvLSTM2D ConvLSTM3D GRU GRUCell LSTM LSTMCell RNN SimpleRNN SimpleRNNCell
    StackedRNNCells TimeDistributed
    """.split()

# Where a tensor of one dim has an entry for each row. Others mix along the last
# dim, or take it for one row.
OF_ONE_DIM = """
    ELU LeakyReLU ReLU Embedding Identity Add Average Maximum Minimum Multiply
    Subtract Rescaling AlphaDropout Dropout GaussianDropout GaussianNoise
    """.split()

# What they draw may look like a draw for rows and be none, such as two numbers
# for all images. So where all shards shall draw what one device draws, they see
# the global batch.
OF_ALL_DRAWS = """
    AugMix RandAugment RandomElasticTransform RandomGaussianBlur
    """.split()

# They take a tensor of three dims for one image.
OF_IMAGES = """
    AugMix AutoContrast CenterCrop ContrastLimitedAdaptiveHistogramEqualization
    Equalization RandAugment RandomBrightness RandomColorDegeneration
    RandomColorJitter RandomContrast RandomCrop RandomElasticTransform
    RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHue
    RandomInvert RandomPerspective RandomPosterization RandomRotation
    RandomSaturation RandomSharpness RandomShear RandomTranslation RandomZoom
    Resizing Solarization
    """.split()

# Their argument `attention_mask` has rows if it has more than two dims.
OF_MASKS = ["MultiHeadAttention", "GroupQueryAttention"]

# Losses of a batch as a whole: any axis.
OF_ALL_ROWS = ["Dice", "Tversky"]


class _Lists:
    """The lists above, as classes, and functions that known code may be made
    of. Made when the first is asked for, since Keras's layers stand above."""

    def __init__(self):
        from keras import layers
        from keras import losses
        from keras import metrics
        from keras.src import activations
        from keras.src import metrics as source
        from keras.src.losses import losses as functions

        def named(names):
            return frozenset(getattr(layers, name) for name in names)

        def classes(module, base):
            values = vars(module).values()
            return frozenset(
                v for v in values if isinstance(v, type) and v is not base
            )

        self.layers = named(LAYERS)
        self.of_one_dim = named(OF_ONE_DIM)
        self.of_images = named(OF_IMAGES)
        self.of_masks = named(OF_MASKS)
        self.of_all_draws = named(OF_ALL_DRAWS)
        # They count with rows as `losses.loss` and `metric_states` say.
        self.losses = classes(losses, losses.Loss)
        self.wrapper = functions.LossFunctionWrapper
        self.of_all_rows = frozenset(
            getattr(losses, name) for name in OF_ALL_ROWS
        )
        self.mean = metrics.Mean
        self.metrics = classes(metrics, metrics.Metric)
        self.activations = frozenset(activations.ALL_OBJECTS)
        modules = [
            module
            for name, module in vars(source).items()
            if inspect.ismodule(module) and name.endswith("_metrics")
        ]
        self.functions = frozenset(
            value
            for module in (functions, *modules)
            for value in vars(module).values()
            if inspect.isfunction(value)
        )


@functools.cache
def _models():
    from keras.src import layers
    from keras.src import models
    from keras.src import quantizers
    from keras.src.models.functional import Functional

    return types.SimpleNamespace(
        AbsMaxQuantizer=quantizers.AbsMaxQuantizer,
        Functional=Functional,
        Layer=layers.Layer,
        Sequential=models.Sequential,
    )


@functools.cache
def lists():
    """The lists of Keras's own classes; made once, when they are asked for."""
    return _Lists()


def is_known(layer):
    """Whether a layer, with all that is in it, is Keras's own."""
    known = _known.get(layer)
    if known is None:
        known = _known[layer] = _is_known(layer, is_inner=False)
    return known


_known = weakref.WeakKeyDictionary()


def forget():
    """To be called where layers may have been changed."""
    _known.clear()


def _is_known(layer, is_inner=True):
    own = vars(layer)
    if "call" in own or "__call__" in own:
        return False
    if is_inner and layer.activity_regularizer is not None:
        return False  # What it adds as a loss is of all rows.
    if is_container(layer):
        return _is_known_container(layer)
    return (
        type(layer) in lists().layers
        and not getattr(layer, "stateful", False)
        and not (type(layer) in lists().of_all_draws and _draws_for_all())
        and all(
            value in lists().activations
            for name, value in own.items()
            if name.endswith("activation") and callable(value)
        )
        and all(
            axis is None or axis == -1 or axis > 0
            for name in ("axis", "axes", "_attention_axes")
            for axis in tree.flatten(own.get(name))
        )
        and keeps_rows(own.get("equation"))
        and _quantizes_rows(layer)
        and all(map(_is_known, layer._layers))
    )


def _quantizes_rows(layer):
    """Whether a layer that may be quantized scales each row by itself."""
    if layer.quantization_mode == "float8":
        return False  # It keeps the largest entry of all rows.
    quantizer = getattr(layer, "inputs_quantizer", None)
    if quantizer is None:
        return True
    axes = getattr(layer, "quantization_axis", None) or quantizer.axis
    return (
        type(quantizer) is _models().AbsMaxQuantizer
        and axes is not None
        and all(axis == -1 or axis > 0 for axis in axes)
    )


def _draws_for_all():
    context = current()
    return context is not None and context.distribution.draw_global_batch


def keeps_rows(equation):
    """Whether an einsum with a kernel treats entries of dim 0 one by one."""
    if equation is None:
        return True
    inputs, _, output = equation.replace(" ", "").partition("->")
    inputs, _, kernel = inputs.partition(",")
    if inputs.startswith("..."):
        return output.startswith("...") and "..." not in kernel
    first = inputs[:1]
    return output.startswith(first) and first not in kernel


def is_container(layer):
    """Whether a layer's call is that of Keras's models of layers."""
    return isinstance(layer, (_models().Functional, _models().Sequential)) and (
        type(layer).call
        in (_models().Functional.call, _models().Sequential.call)
        and type(layer).__call__ is _models().Layer.__call__
    )


def _is_known_container(model):
    if isinstance(model, _models().Sequential):
        inner = model.layers
        functional = model._functional
    else:
        inner = model.operations
        functional = model
    if functional is not None and not all(
        x.shape[:1] == (None,) for x in functional.inputs
    ):
        return False  # Rows whose number is fixed are all rows.
    if not all(
        isinstance(each, _models().Layer) and _is_known(each) for each in inner
    ):
        return False
    if functional is None:
        return True
    return all(x.ndim > 1 for x in functional.outputs) and all(
        takes(node.operation, [x.ndim for x in node.input_tensors])
        for nodes in functional._nodes_by_depth.values()
        for node in nodes
        if not node.is_input
    )


def takes(layer, ndims):
    """Whether a known layer knows about rows in dim 0 of its arguments.

    Args:
        ndims: list of ints, how many dims they have.
    """
    if min(ndims) > 3:
        return True
    if type(layer) in lists().of_images:
        return False
    # Of several, one may have an entry for each row.
    return max(ndims) > 1 or type(layer) in lists().of_one_dim


def is_known_loss(loss, y_pred):
    """Whether a loss is Keras's own, for predictions of such a shape."""
    if "call" in vars(loss):
        return False
    function = getattr(loss, "fn", None)
    if type(loss) not in lists().losses and not (
        type(loss) is lists().wrapper and function in lists().functions
    ):
        return False
    axis = getattr(loss, "_fn_kwargs", {}).get("axis", -1)
    return type(loss) in lists().of_all_rows or _is_of_each_row(axis, y_pred)


def is_known_metric(metric, y_pred=None):
    """Whether a metric is Keras's own, for predictions of such a shape."""
    if type(metric) not in lists().metrics or "update_state" in vars(metric):
        return False
    function = getattr(metric, "_fn", None)
    if function is not None and function not in lists().functions:
        return False
    if y_pred is None or function is None:
        return True
    axis = getattr(metric, "_fn_kwargs", {}).get("axis", -1)
    return _is_of_each_row(axis, y_pred)


def _is_of_each_row(axis, y_pred):
    ndim = getattr(y_pred, "ndim", 0)
    if type(axis) is not int or ndim < 2:
        return False
    return axis % ndim > 0


def has_released(model, names):
    """Whether methods of a model are Keras's own, of its class and on itself.

    Args:
        model: the model.
        names: of the methods.
    """
    from keras.src.models import Model  # Imports the backend.

    return all(
        name not in vars(model)
        and getattr(type(model), name) is getattr(Model, name)
        for name in names
    )


def is_known_program(model, step):
    """Whether a step of a model runs no user code.

    Args:
        model: the model.
        step: `"train_step"`, `"test_step"` or `"predict_step"`.
    """
    names = [step]
    if step != "predict_step":
        names += ["compute_loss", "compute_metrics"]
    if not has_released(model, names):
        return False
    if not is_container(model) or not is_known(model):
        return False
    if model.activity_regularizer is not None:
        return False
    if step == "predict_step":
        return True
    return _are_known_losses(model) and _are_known_metrics(model)


def _are_known_losses(model):
    compiled = model._compile_loss
    if compiled is None:
        return True
    # Built before the first step: whether all are known is seen then.
    return compiled.built and all(
        loss is None or is_known_loss(loss, _Shape)
        for _, loss, *_ in compiled._flat_losses
    )


def _are_known_metrics(model):
    compiled = model._compile_metrics
    if compiled is None:
        return True
    return compiled.built and all(
        is_known_metric(m, _Shape) for m in compiled.metrics
    )


class _Shape:
    """Of predictions: what is known to have dims besides the rows."""

    ndim = 3
