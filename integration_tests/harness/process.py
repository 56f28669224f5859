"""One of the processes that run a case: their start, state and step."""

import datetime
import faulthandler
import gc
import os
import shutil
import sys
import time

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

from integration_tests.harness import worlds
from integration_tests.harness.process_set import GRACE_SECONDS

# The launcher's own tests need neither torch nor Keras, only processes.
BARE = os.environ.get("INTEGRATION_TESTS_BARE") == "1"


def start_processes():
    """Joins the processes, as a Keras program does at its start."""
    if BARE:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        return
    import keras

    keras.distribution.initialize()
    # `clear_session` collects garbage, before each case: not what the imports
    # made, which takes most of a second.
    gc.freeze()


def reset_state():
    """Puts back what the case before may have left behind."""
    start_processes()
    if BARE:
        return
    import keras

    keras.distribution.set_distribution(None)
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


def is_joined():
    """Whether this process is still one of the group."""
    if BARE:
        return True
    import torch.distributed as dist

    return dist.is_initialized()


def wait_in_step(seconds):
    """Raises where the processes ran different collectives.

    Collective: every process of the world calls it.
    """
    if BARE or not is_joined():
        return
    import torch.distributed as dist

    try:
        dist.barrier(timeout=datetime.timedelta(seconds=seconds))
    except RuntimeError as error:
        raise RuntimeError(
            "The processes are out of step: the barrier after the case was "
            f"not met within {seconds} s. Did one process run a collective "
            "that another did not, or start one without waiting for it?"
        ) from error


class TorchrunProcess:
    """The pytest plugin of a process that torchrun started.

    Each process runs the same items in the same order; rank 0 reports. After
    a failure the processes may be out of step, so the first one ends the run:
    this process leaves, and torchrun ends the others.
    """

    def __init__(self):
        self.rank = int(os.environ["RANK"])

    def quieten(self, config):
        config.option.maxfail = 1
        self.stderr = config.stash.get(fault_handler_stderr_fd_key, 2)
        if self.rank != 0:
            reporter = config.pluginmanager.get_plugin("terminalreporter")
            config.pluginmanager.unregister(reporter)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if self._runs_here(item):
            reset_state()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        if not self._runs_here(item):
            return (yield)
        # torchrun has no limit of its own.
        faulthandler.dump_traceback_later(
            worlds.limit_of(item), exit=True, file=self.stderr
        )
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        try:
            result = yield
        except pytest.skip.Exception:
            self._meet(item)
            raise
        self._meet(item)
        return result

    def _meet(self, item):
        if self._runs_here(item):
            wait_in_step(worlds.limit_of(item))

    def _runs_here(self, item):
        return worlds.world_of(item) == int(os.environ["WORLD_SIZE"])

    def pytest_runtest_logreport(self, report):
        if self.rank == 0 or not report.failed:
            return
        text = f"\nrank {self.rank} failed: {report.nodeid}\n"
        text += report.longreprtext + "\n"
        for name, content in report.sections:
            text += f"--- {name} ---\n{content}\n"
        os.write(self.stderr, text.encode())

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus):
        if exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            if self.rank == 0:
                shutil.rmtree(worlds.shared_folder(), ignore_errors=True)
            if not BARE and "torch" in sys.modules:
                self._leave()
        elif self.rank != 0:
            # torchrun ends rank 0 as soon as another process is gone: let it
            # write its report, where it failed as well or is done.
            time.sleep(GRACE_SECONDS)

    def _leave(self):
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
