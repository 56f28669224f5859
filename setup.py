"""Lists the packages; everything else stands in pyproject.toml.

The folder `keras` is installed as `keras_torch_distribution`, together with
every folder below it, so that no new one can be forgotten.
"""

from setuptools import find_namespace_packages
from setuptools import setup

PACKAGE = "keras_torch_distribution"

setup(
    package_dir={PACKAGE: "keras"},
    packages=[PACKAGE]
    + [
        f"{PACKAGE}.{name}"
        for name in find_namespace_packages(
            "keras", exclude=["__pycache__", "*.__pycache__"]
        )
    ],
)
