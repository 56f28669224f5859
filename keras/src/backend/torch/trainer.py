"""Overlay: `fit`, `evaluate` and `predict` on the rows of a data shard."""

import contextlib
import inspect

import torch
from torch.distributed.tensor import DTensor

from keras.src import losses
from keras.src import tree
from keras.src.backend.torch import trainer as upstream
from keras.src.backend.torch.distribution import marks
from keras.src.backend.torch.distribution import modes
from keras.src.backend.torch.distribution.batch import gathers
from keras.src.backend.torch.distribution.global_rows import borders
from keras.src.backend.torch.distribution.global_rows import known
from keras.src.backend.torch.distribution.mesh import agreement
from keras.src.backend.torch.distribution.mesh import configuration
from keras.src.backend.torch.distribution.mesh import failures
from keras.src.backend.torch.distribution.mesh import process_group
from keras.src.backend.torch.distribution.mesh import rows
from keras.src.backend.torch.distribution.mesh import together
from keras.src.backend.torch.distribution.mesh import trail
from keras.src.backend.torch.distribution.mesh.context import current
from keras.src.backend.torch.distribution.mesh.context import logger
from keras.src.backend.torch.distribution.mesh.context import own_distribution
from keras.src.backend.torch.distribution.ops import activations
from keras.src.backend.torch.distribution.training import accumulation
from keras.src.backend.torch.distribution.training import checks
from keras.src.backend.torch.distribution.training import feeding
from keras.src.backend.torch.distribution.training import late
from keras.src.backend.torch.distribution.training import logs as logs_lib
from keras.src.backend.torch.distribution.training import metric_states
from keras.src.backend.torch.distribution.training import position
from keras.src.backend.torch.distribution.training import preemption
from keras.src.backend.torch.distribution.training import stopping

__all__ = ["TorchEpochIterator", "TorchTrainer"]

released_compute_loss = upstream.TorchTrainer._compute_loss

# What a program may have of its own in a step that is otherwise Keras's.
STEPS = ("train_step", "test_step", "compute_loss", "compute_metrics")


class TorchTrainer(upstream.TorchTrainer):
    stop_training = stopping.StopTraining()

    def __init__(self):
        super().__init__()
        # Not by `setattr`: a model is no module of torch's yet.
        self.__dict__[marks.MADE_UNDER] = current()

    def make_train_function(self, force=False):
        if self.train_function is None or force:
            super().make_train_function(force)
            self.train_function = TrainStep(self, self.train_function)

    def make_test_function(self, force=False):
        if self.test_function is None or force:
            super().make_test_function(force)
            self.test_function = Step(self, self.test_function)

    def make_predict_function(self, force=False):
        if self.predict_function is None or force:
            super().make_predict_function(force)
            self.predict_function = PredictStep(self, self.predict_function)
        return self.predict_function

    def fit(self, *args, **kwargs):
        with position.of_fit(self), preemption.of_fit(self):
            return self._run("fit", args, kwargs)

    def evaluate(self, *args, **kwargs):
        return self._run("evaluate", args, kwargs)

    def predict(self, *args, **kwargs):
        return self._run("predict", args, kwargs)

    def train_on_batch(self, *args, **kwargs):
        with own_distribution(self):
            if current() is None:
                return super().train_on_batch(*args, **kwargs)
            with failures.told():
                together.begin("in `train_on_batch`")
                return super().train_on_batch(*args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        with own_distribution(self):
            if current() is None:
                return super().test_on_batch(*args, **kwargs)
            with failures.told():
                together.begin("in `test_on_batch`")
                return super().test_on_batch(*args, **kwargs)

    def predict_on_batch(self, *args, **kwargs):
        with own_distribution(self), failures.told():
            return super().predict_on_batch(*args, **kwargs)

    def _symbolic_build(self, iterator=None, data_batch=None):
        if isinstance(iterator, TorchEpochIterator):
            position.follow(self, iterator.position)
        context = current()
        if context is not None and context.data_size > 1:
            if iterator is not None and context.auto_shard:
                # Layers are built for the rows of the global batch.
                iterator = feeding.GlobalShapes(iterator)
        super()._symbolic_build(iterator, data_batch)

    def _run(self, name, args, kwargs):
        """Keras's `fit`, `evaluate` or `predict`, seen once on the screen.

        Collective under a distribution: every process calls it.
        """
        with own_distribution(self):
            if current() is None:
                return getattr(super(), name)(*args, **kwargs)
            with failures.told():
                result = self._run_distributed(name, args, kwargs)
            _warn_of_unmatched_outputs()
            return result

    def _run_distributed(self, name, args, kwargs):
        method = getattr(super(), name)
        together.go_on()
        for step in (
            self.train_function,
            self.test_function,
            self.predict_function,
        ):
            if isinstance(step, Step):
                step.begin()
        arguments = inspect.signature(method).bind(*args, **kwargs).arguments
        # What is gathered under `**kwargs` goes back to where it came from.
        arguments.update(arguments.pop("kwargs", {}))
        if process_group.process_id():
            arguments["verbose"] = 0
        _check_call(self, name, arguments)
        if name == "predict":
            return method(**arguments)
        if name == "evaluate":
            with late.in_loop(self, arguments):
                return method(**arguments)
        with stopping.of_fit(self), late.in_loop(self, arguments):
            return method(**arguments)

    def _get_metrics_result_or_logs(self, logs):
        # An epoch, or an evaluation, is over.
        if isinstance(logs, late.Logs):
            logs = logs.settled()
        for step in (self.train_function, self.test_function):
            if isinstance(step, Step):
                step.conclude()
        here = position.of(self)
        if not logs and here is not None and here.steps:
            # All steps of the epoch were done before it was restored.
            return self.get_metrics_result()
        return super()._get_metrics_result_or_logs(logs)

    def _takes_sharded_outputs(self):
        """Whether loss and step are Keras's own, and the loss of the kind
        that is computed on sharded classes."""
        loss = getattr(self._compile_loss, "_user_loss", None)
        return (
            isinstance(loss, losses.SparseCategoricalCrossentropy)
            and loss._fn_kwargs.get("from_logits", False)
            and known.has_released(self, STEPS)
        )

    def _runs_backward_once(self):
        """Whether nobody else can reach the graph of the loss."""
        loss = getattr(self._compile_loss, "_user_loss", None)
        is_sparse = type(loss) is losses.SparseCategoricalCrossentropy
        return is_sparse and known.has_released(self, STEPS)

    def _compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        loss = released_compute_loss(
            self, x, y, y_pred, sample_weight, training
        )
        return activations.whole(loss)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if self._compile_metrics is not None:
            y_pred = tree.map_structure(activations.whole, y_pred)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def _aggregate_additional_loss(self, loss):
        return super()._aggregate_additional_loss(activations.whole(loss))


for _name in (
    "fit",
    "evaluate",
    "predict",
    "train_on_batch",
    "test_on_batch",
    "predict_on_batch",
):
    _released = getattr(upstream.TorchTrainer, _name)
    _ours = getattr(TorchTrainer, _name)
    _ours.__doc__ = _released.__doc__
    _ours.__signature__ = inspect.signature(_released)


def _warn_of_unmatched_outputs():
    warn = getattr(
        current().distribution, "warn_of_unmatched_outputs", lambda: None
    )
    if process_group.is_first():
        warn()


class Step:
    """A train, test or predict function of released Keras, on local rows.

    Collective under a distribution: every process calls it.

    Keras's own code computes on local rows. A step that runs user code is
    handed the global batch: see `global_rows`.

    Args:
        model: the trainer.
        function: takes `[data]` and returns logs or outputs.
    """

    name = "test_step"

    def __init__(self, model, function):
        self.model = model
        self.function = function
        self.is_known = None  # Whether all code in it is Keras's own.
        self.is_released = None  # Whether its methods are.
        self.gathers = None  # Whether a data axis cuts weights.
        self.pending = None  # The `late.Pending` of the last one.
        self.is_compiled = False  # Whether the step under way is.
        self.cuts_weights = None  # Whether the layout does.
        self.steps = 0  # So many since `fit` began.
        self.kinds_of_batches = set()

    def __call__(self, data):
        context = current()
        if context is None:
            return self.function(data)
        late.begin(self.pending)
        try:
            return self.do(data, context)
        finally:
            late.end(self.pending)

    def do(self, data, context):
        """One step, of which variables hold the local states."""
        is_in_loop = isinstance(data, rows.Batch)
        checks.check_once(self.model, context)
        if not is_in_loop:
            data = feeding.to_batch(data[0], context)
            # Nothing tells when a loop of the user's begins.
            self.forget()
            self.check_batch(data)
        facts = self.facts(data, context)
        trail.begin()
        if self.is_known is None:
            self.is_known = known.is_known_program(self.model, self.name)
        if context.data_size > 1 and not self.is_known:
            return self.on_global_batch(data, facts, context)
        states = self.states(context)
        with (
            modes.on_global_batch(None),
            rows.current_rows(data.rows),
            metric_states.local(states, context),
        ):
            with logs_lib.unchanged_by_no_rows(states, data.rows):
                with self.compiled_if_met_before(data):
                    logs = self.run(data)
            return self.finish(logs, facts, context, is_in_loop)

    def begin(self):
        """To be called as `fit`, `evaluate` or `predict` begins.

        Collective if one that failed has left a step behind.
        """
        self.conclude()
        self.forget()
        self.steps = 0

    def forget(self):
        """Lets the next batch find out anew whose code is run."""
        self.is_known = self.is_released = self.cuts_weights = None
        known.forget()

    def has_released_methods(self):
        """Whether the step is Keras's own, in which layers may be the user's:
        nobody in it asks to stop, and its logs are results of metrics."""
        if self.is_released is None:
            names = (self.name, *STEPS, "get_metrics_result")
            self.is_released = known.has_released(self.model, names)
        return self.is_released

    def check_batch(self, data):
        """Nothing here: the reduction of logs tells whether batches differ."""

    def facts(self, data, context):
        """What must be the same on all processes in this step."""
        # Rows that are local from the start are not the same.
        return dict(data.facts) if context.auto_shard else {}

    def on_global_batch(self, data, facts, context):
        """Runs the step where code sees the global batch."""
        self.is_compiled = False
        states = [v for v in self.states(context) if v.aggregation == "sum"]
        with (
            rows.current_rows(None),
            metric_states.local(states, context),
            borders.step(context) as step,
            self.uncompiled(),
        ):
            logs = self.run([step.enter(data[0], data.rows)])
            return self.finish_global(logs, states, facts, context)

    def compiled_if_met_before(self, data):
        """Within it, a compiled step is run as written on a new kind of batch:
        layers find their style there, which compiled code takes as known."""
        self.is_compiled = self.may_compile(data)
        return (
            contextlib.nullcontext() if self.is_compiled else self.uncompiled()
        )

    def may_compile(self, data):
        if not self.model.jit_compile or self.cuts_weights:
            return False
        kind = tuple(
            (tuple(x.shape[1:]), str(x.dtype))
            for x in tree.flatten(data[0])
            if x is not None
        )
        is_new = kind not in self.kinds_of_batches
        self.kinds_of_batches.add(kind)
        if is_new or self.cuts_weights is None:
            self.cuts_weights = any(
                isinstance(v._value, DTensor) for v in self.model.variables
            )
        if self.cuts_weights:
            self.say_not_compiled()
        return not (is_new or self.cuts_weights)

    def say_not_compiled(self):
        if current().says_first("not compiled") and process_group.is_first():
            logger.warning(
                "`jit_compile=True` has no effect on '%s': its layout cuts "
                "weights, which torch's compiler does not trace. The step runs "
                "as written.",
                self.model.name,
            )

    def uncompiled(self):
        # torch's compiler does not trace the table: it would break the graph
        # at each function of user code.
        if not self.model.jit_compile:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")

    def states(self, context):
        """The variables of metrics, if data shards count apart."""
        if context.data_size == 1:
            return []
        return metric_states.states_of(
            self.model.metrics, lambda: self.model.variables
        )

    def run(self, data):
        if self.model._takes_sharded_outputs():
            with modes.sharded_outputs():
                return self.function(data)
        return self.function(data)

    def finish(self, logs, facts, context, is_in_loop):
        states = self.states(context)
        is_released = self.has_released_methods()
        self.reduce(
            logs_lib.reduce_logs, logs, states, facts, context, is_released
        )
        if (
            is_in_loop
            and is_released
            # Whoever listens takes part in each batch, and acts after it.
            and preemption.of(self.model) is None
            and late.may_wait(self.model, states)
        ):
            return logs if context.data_size == 1 else late.Logs(self.pending)
        return self.conclude()

    def finish_global(self, logs, states, facts, context):
        self.reduce(logs_lib.reduce_global_logs, logs, states, facts, context)
        return self.conclude()

    def reduce(self, reduce_logs, logs, states, facts, context, *are_results):
        """Begins to reduce the logs of a step, and ends the one before."""
        self.conclude(is_superseded=True)
        facts[agreement.GATHERED] = trail.gathers()
        if not context.has_unlike_shards:
            facts[agreement.COMMUNICATED] = trail.layers(context.data_index)
        ballot = agreement.Ballot(facts)
        asked = preemption.of(self.model)
        is_asked = asked is not None and asked.asked
        reduction = reduce_logs(
            self.model.metrics,
            states,
            logs,
            [float(self.wants_to_stop), float(is_asked), *ballot.numbers],
            context,
            *are_results,
        )
        self.pending = late.Pending(reduction, ballot, context)

    def conclude(self, is_superseded=False):
        """Global logs of the last step, unless that has been done; stops if any
        process wants to, fails if they differ. Waits for all processes.

        Collective if they differ: every process calls it.

        Args:
            is_superseded: bool, whether metrics hold what a later step counts.

        Returns:
            The logs; None if they are superseded.
        """
        pending, self.pending = self.pending, None
        if pending is None:
            return None
        logs = None
        if is_superseded:
            pending.reduction.forget()
        else:
            logs = pending.settle()
        stop, is_asked, *sums = pending.reduction.flags
        if pending.ballot.check(sums, f"in a {self.name.replace('_', ' ')}"):
            # Each data shard by itself was at one.
            pending.context.has_unlike_shards = True
        if stop:
            self.wants_to_stop = True
        asked = preemption.of(self.model)
        if asked is not None:
            asked.agreed |= bool(is_asked)
        return logs

    # Nobody asks an evaluation or a prediction to stop.
    wants_to_stop = False


class TrainStep(Step):
    name = "train_step"

    @property
    def wants_to_stop(self):
        return stopping.is_wanted(self.model)

    @wants_to_stop.setter
    def wants_to_stop(self, value):
        stopping.agree(self.model, value)

    def gathers_weights(self):
        """Whether a data axis cuts weights of the model."""
        if self.gathers is None:
            context = current()
            self.gathers = any(
                isinstance(v._value, DTensor)
                and context.cuts_data(v._value.placements)
                for v in self.model.trainable_variables
            )
        return self.gathers

    def forget(self):
        super().forget()
        self.gathers = None

    def facts(self, data, context):
        facts = super().facts(data, context)
        is_time = self.steps % checks.STEPS_BETWEEN == 0
        self.steps += 1
        facts.update(checks.facts_of_training(self.model, is_time))
        return facts

    def run(self, data):
        step = getattr(self.model.train_step, "__func__", None)
        if step is not TorchTrainer.train_step:
            return super().run(data)
        if self.is_known and self.gathers_weights():
            # Keras's step does it too, after the forward pass, beside whose
            # gathered weights the last gradients would lie.
            self.model.zero_grad()
        once = contextlib.nullcontext()
        if not self.is_compiled and self.model._runs_backward_once():
            once = modes.running_backward_once()
        with once, accumulation.accumulating(self.model.optimizer, current()):
            return super().run(data)


class PredictStep(Step):
    name = "predict_step"

    def run(self, data):
        return self.function(data)

    def check_batch(self, data):
        """Raises if the batches that processes were handed differ.

        Collective: every process calls it.
        """
        agreement.compare(data.facts, "in a prediction")

    def finish(self, outputs, facts, context, is_in_loop):
        own = self.model._get_own_metrics()
        if context.data_size > 1 and len(self.model.metrics) > len(own):
            # Those of layers, which predictions update too.
            states = self.states(context)
            self.reduce(logs_lib.reduce_logs, {}, states, facts, context)
            self.conclude()
        outputs = tree.map_structure(activations.plain, outputs)
        if context.data_size == 1 or not context.auto_shard:
            # Rows were local from the start: so are those of the outputs.
            return outputs
        return tree.map_structure(
            lambda x: (
                gathers.gather(x, context)
                if isinstance(x, torch.Tensor) and x.ndim
                else x
            ),
            outputs,
        )

    def finish_global(self, outputs, states, facts, context):
        if states:
            self.reduce(logs_lib.reduce_global_logs, {}, states, facts, context)
            self.conclude()
        outputs = tree.map_structure(activations.plain, outputs)
        return borders.leave(outputs, gathers=context.auto_shard)


def _check_call(model, name, arguments):
    """Raises on all processes if they call a method in different ways.

    Collective: every process calls it.
    """
    facts = configuration.facts_of_arguments(name, arguments)
    if name == "fit" and model.built:
        facts.update(configuration.facts_of_model(model))
    agreement.compare(facts, f"in `{name}`")


class TorchEpochIterator(upstream.TorchEpochIterator):
    def __init__(self, x, y=None, sample_weight=None, **kwargs):
        self.position = position.Position()
        context = current()
        self._is_sharded = context is not None
        if self._is_sharded:
            names = ("batch_size", "steps_per_epoch", "shuffle", "class_weight")
            x = feeding.data_adapter(
                context,
                x=x,
                y=y,
                sample_weight=sample_weight,
                **{name: kwargs[name] for name in names if name in kwargs},
            )
            y = sample_weight = None
        super().__init__(x, y, sample_weight, **kwargs)
        self.position.is_made_anew = self.steps_per_epoch is None
        self.position.generators = feeding.generators_of(self.data_adapter)

    def _get_iterator(self):
        if not self.position.is_followed:
            return super()._get_iterator()
        return self.position.follow(super()._get_iterator)

    def __iter__(self):
        super().__iter__()
        self.position.leave_out(self)
        return self

    def __next__(self):
        begin_step, end_step, batches = super().__next__()
        self._steps_seen += self.position.pop_seen()
        if self._is_sharded:
            return begin_step, end_step, batches[0]
        return begin_step, end_step, batches
