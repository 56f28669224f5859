"""What of Keras's tests cannot hold on several processes, and why."""

# Patterns of ids (`fnmatch`) of tests that write all of their temporary folders
# themselves, on every process.
PRIVATE_FOLDERS = (
    "*/audio_dataset_utils_test.py::*",
    "*/code_stats_test.py::*",
    "*/file_utils_test.py::*",
    "*/image_dataset_utils_test.py::*",
    "*/saving_lib_test.py::SafeGetH5DatasetTest::test_rejects_*",
    "*/saving_lib_test.py::SafeZip*",
    "*/text_dataset_utils_test.py::*",
)

BOTH = ("data", "model")

ONCE = "looks for a message that process 0 alone says, on all of them"
ROWS = "fits a batch of arrays of other rows, which all say can not be split"
ROUNDING = "convolves fewer rows at a time: 82 of 335,916 sums round by 3e-6"
WRITES = "writes on every process into the file that process 0 has saved"
EARLY = "looks that a folder is not there, which process 0 may have made"
BACK = (
    "reads from a file that is being written, of which process 0 alone has it"
)
PRIVATE = "saves by Keras, into a folder that each process has for itself"
WHOLE = "a save that fails leaves no file: what is saved appears at once, whole"
AGAIN = (
    "asks a private method for an error that would hide a layout's: Keras "
    "calls it again where another variable has failed"
)

# From a pattern of test ids (`fnmatch`) to the distributions and the reason.
EXPECTED = {
    "*/learning_rate_scheduler_test.py::*::test_verbose_logging": (BOTH, ONCE),
    "*/reduce_lr_on_plateau_test.py::*::test_verbose_logging": (BOTH, ONCE),
    "*/io_utils_test.py::*::test_enable_interactive_logging": (BOTH, ONCE),
    "*/io_utils_test.py::*::test_print_msg_*": (BOTH, ONCE),
    "*/progbar_test.py::*::test_stateful_stateless_output_*": (BOTH, ONCE),
    "*/variables_test.py::*::test_deferred_initialize_already_initialized": (
        BOTH,
        AGAIN,
    ),
    "*/mel_spectrogram_test.py::*::test_mel_spectrogram_basics": (
        ("data",),
        ROWS,
    ),
    "*/stft_spectrogram_test.py::*::test_spectrogram_channels_*": (
        ("data",),
        ROUNDING,
    ),
    "*/legacy_h5_format_test.py::DirectoryCreationTest::*": (BOTH, EARLY),
    "*/file_editor_test.py::*::test_rejects_*": (BOTH, WRITES),
    "*/saving_api_test.py::*::test_load_weights_rejects_h5_*_link": (
        BOTH,
        WRITES,
    ),
    "*/saving_lib_test.py::SavingH5IOStoreTest::*_io_store_basics": (
        BOTH,
        BACK,
    ),
    "*/saving_lib_test.py::SafeZip*::test_load_model_rejects_*bomb*": (
        BOTH,
        PRIVATE,
    ),
    "*/saving_lib_test.py::*::test_load_weights_rejects_shape_bomb": (
        BOTH,
        WRITES,
    ),
    "*/saving_lib_test.py::*::test_save_model_exception_raised_*": (
        BOTH,
        WHOLE,
    ),
}
