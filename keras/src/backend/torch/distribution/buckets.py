"""Buckets: gradients that one collective reduces, in one flat buffer."""

import torch
import torch.distributed as dist

BUCKET_BYTES = 25 * 2**20  # as torch's DDP


def build(gradients):
    """Cuts gradients into buckets of one dtype and device each.

    Args:
        gradients: iterable of triples in the order of the result: a number,
            a tensor like the gradient (of which memory is not needed), and
            the device.
    """
    buckets = []
    open_buckets = {}
    for number, like, device in gradients:
        key = (like.dtype, device)
        bucket = open_buckets.get(key)
        if bucket is None or bucket.bytes > BUCKET_BYTES:
            bucket = open_buckets[key] = Bucket(*key)
            buckets.append(bucket)
        bucket.add(number, like)
    return buckets


class Bucket:
    """Gradients that one collective reduces in one flat buffer.

    The buffer is a new one in each pass: its parts become the gradients, and
    somebody may keep them.
    """

    def __init__(self, dtype, device):
        self.dtype, self.device = dtype, device
        self.numbers, self.shapes, self.sizes = [], [], []
        self.bytes = 0
        self.buffer = None
        self.work = None

    def add(self, number, local):
        self.numbers.append(number)
        self.shapes.append(local.shape)
        self.sizes.append(local.numel())
        self.bytes += local.numel() * local.element_size()

    def start(self, grads, weight, group):
        self.buffer = torch.empty(
            sum(self.sizes), dtype=self.dtype, device=self.device
        )
        with torch.no_grad():
            for number, part in self._parts():
                # Of no rows, a gradient may be NaN.
                if number in grads and weight:
                    torch.mul(grads[number], weight, out=part)
                else:
                    part.zero_()
        self.work = dist.all_reduce(self.buffer, group=group, async_op=True)

    def finish(self):
        """Waits, and gives the reduced gradients by number."""
        self.work.wait()
        parts = list(self._parts())
        self.work = self.buffer = None
        return parts

    def _parts(self):
        pieces = self.buffer.split(self.sizes)
        for number, piece, shape in zip(self.numbers, pieces, self.shapes):
            yield number, piece.view(shape)
