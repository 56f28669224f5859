"""What of Keras's tests cannot hold on several processes, and why."""

# Tests that write into their temporary folders themselves, on every process.
PRIVATE_FOLDERS = (
    "audio_dataset_utils_test.py",
    "file_utils_test.py",
    "image_dataset_utils_test.py",
    "text_dataset_utils_test.py",
)

BOTH = ("data", "model")

ONCE = "looks for a message that process 0 alone says, on all of them"
WHOLE = "a save that fails leaves no file: what is saved appears at once, whole"

# From a pattern of test ids (`fnmatch`) to the distributions and the reason.
EXPECTED = {
    "*/learning_rate_scheduler_test.py::*::test_verbose_logging": (BOTH, ONCE),
    "*/reduce_lr_on_plateau_test.py::*::test_verbose_logging": (BOTH, ONCE),
    "*/saving_lib_test.py::*::test_save_model_exception_raised_*": (
        BOTH,
        WHOLE,
    ),
}
