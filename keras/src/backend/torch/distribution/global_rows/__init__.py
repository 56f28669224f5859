"""The global batch, as user code sees it.

- `carrier`: a tensor that holds local rows and looks like all of them;
- `table`: what a torch function does when it is handed one;
- `known`: which code of Keras's needs none of this;
- `borders`: how batches enter a step, a layer of Keras's, and leave.
"""
