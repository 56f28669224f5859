"""What a layout costs, told before it is paid: see `distribution/report.py` of
Keras's own tree, which makes a text of it.

- `collectives`: which of torch's operators communicate, and how much.
- `fake_world`: one process that is one of many.
- `recorder`: what a step communicates, for which layer (`reasons`), and its
  `memory`.
- `dry_run`: a few steps of a model, recorded.

It stands above `training`, whose real steps it runs, and nothing stands on it:
no line of a layer, a gradient or a trainer knows that it is recorded.
"""
