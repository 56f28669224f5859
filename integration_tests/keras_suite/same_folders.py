"""Temporary folders of tests, the same on all processes.

A program under several processes names one folder for all of them: process 0
writes there, all read. A test's `get_temp_dir` would give each its own.
"""

import fnmatch
import functools
import hashlib
import os
import pathlib
import shutil
import sys
import tempfile


class SameFolders:
    """Hands out folders, by test and by how many it has asked for.

    Args:
        root: path of a folder that all processes see.
        rank: int, this process.
        private: patterns of ids of the tests that write their folders
            themselves, on every process: these get a folder each.
        meet: function in which the processes wait for each other.
    """

    def __init__(self, root, rank, private=(), meet=lambda: None):
        self.root, self.rank, self.private = pathlib.Path(root), rank, private
        self.meet = meet
        self.begin("nothing")

    def begin(self, nodeid):
        """Starts a test."""
        self.folder = folder_of(self.root, nodeid)
        self.is_private = any(
            fnmatch.fnmatchcase(nodeid, pattern) for pattern in self.private
        )
        if self.is_private:
            self.folder = self.folder / f"rank{self.rank}"
        self.count = 0

    def make(self):
        """A folder of this test. It goes when all processes are done."""
        folder = self.folder / str(self.count)
        self.count += 1
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def install(self):
        """Lets what tests call for a folder give these."""
        from keras.src import testing

        folders, released = self, tempfile.TemporaryDirectory

        class SameDirectory:
            def __init__(self):
                self.name = folders.make()

            def __enter__(self):
                return self.name

            def __exit__(self, *error):
                pass

            def cleanup(self):
                pass

        def temporary_directory(*args, **kwargs):
            if _is_test(sys._getframe(1)):
                return SameDirectory()
            return released(*args, **kwargs)

        testing.TestCase.get_temp_dir = lambda test: folders.make()
        tempfile.TemporaryDirectory = temporary_directory
        os.listdir = self._together(os.listdir)
        os.remove = self._together(os.remove, once=True)
        shutil.rmtree = self._together(shutil.rmtree, once=True)

    def _together(self, function, once=False):
        """A function that all processes of a test call at the same time.

        None lists a folder while another writes there, or removes a file that
        another reads.
        """

        @functools.wraps(function)
        def call(path, *args, **kwargs):
            is_ours = str(path).startswith(str(self.folder))
            if self.is_private or not is_ours or not _is_test(sys._getframe(1)):
                return function(path, *args, **kwargs)
            self.meet()
            try:
                if not once or self.rank == 0:
                    return function(path, *args, **kwargs)
            finally:
                self.meet()

        return call


def _is_test(frame):
    return frame.f_globals["__name__"].endswith("_test")


def folder_of(root, nodeid):
    digest = hashlib.sha1(nodeid.encode()).hexdigest()[:16]
    return pathlib.Path(root) / digest


def remove(root, nodeid):
    """Removes what a test wrote, once all processes are done with it."""
    folder = folder_of(root, nodeid)
    if os.path.exists(folder):
        shutil.rmtree(folder, ignore_errors=True)
