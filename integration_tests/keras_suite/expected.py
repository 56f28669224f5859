"""What of Keras's tests cannot hold on several processes, and why."""

# Tests that write into their temporary folders themselves, on every process.
PRIVATE_FOLDERS = (
    "audio_dataset_utils_test.py",
    "file_utils_test.py",
    "image_dataset_utils_test.py",
    "text_dataset_utils_test.py",
)

# From a pattern of test ids (`fnmatch`) to the reason.
EXPECTED = {}
