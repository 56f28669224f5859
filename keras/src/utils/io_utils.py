"""Overlay: messages appear once, from process 0."""

from keras.src.utils import io_utils as upstream

__all__ = ["is_interactive_logging_enabled", "print_msg"]

released_is_interactive = upstream.is_interactive_logging_enabled
released_print_msg = upstream.print_msg


def is_interactive_logging_enabled():
    """As Keras's; only where messages are printed."""
    # A summary goes straight to the screen where it is, else to `print_msg`.
    return released_is_interactive() and _is_first()


def print_msg(message, line_break=True):
    """As Keras's, once for all processes."""
    if _is_first():
        released_print_msg(message, line_break)


def _is_first():
    # Here, since Keras runs this module before others.
    from keras.src.distribution import processes

    return processes.is_writer()
