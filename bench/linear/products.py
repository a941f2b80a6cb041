"""The bare matrix products of the scored rows: the roof of every provider.

A layer and its loss need three: logits, gradient of hidden, gradient of weight. A loss that
computes the logits again in backward needs four. They are computed as fast as the device can: on a
CPU without instructions for 16-bit products in fp32, from an fp32 weight that is made before.
"""

import torch

from fused_sft_loss.linear.products import dtype_of_products

from ..kernels.cases import DTYPES
from ..kernels.timing import Contender

NAME = "products"
PROBE = (64, 512, 2048)  # rows, hidden, vocabulary


def contender(problem):
    """One forward product, a mark, and the two products of backward."""
    dtype = dtype_of_products(problem.hidden)
    weight = problem.weight.detach().to(dtype)
    inputs = problem.flat.detach()[problem.at].to(dtype)
    # Written here, so their pages are mapped before timing.
    logits = inputs.new_zeros(len(inputs), len(weight))
    grads = torch.zeros_like(inputs), torch.zeros_like(weight)

    def run(clock):
        clock.start()
        torch.mm(inputs, weight.t(), out=logits)
        clock.mark()
        torch.mm(logits, weight, out=grads[0])
        torch.mm(logits.t(), inputs, out=grads[1])
        clock.mark()

    return Contender(NAME, run)


def seconds_of(samples, products):
    """[seconds of three or four products] from samples [(forward, backward)]."""
    return [forward * (products - 2) + backward for forward, backward in samples]


def operations_per_second(dtype, clock):
    """Of a CPU, for products of this dtype: a rough figure, for predictions."""
    rows, hidden, vocab = PROBE
    a, b = (torch.ones(shape, dtype=DTYPES[dtype]) for shape in ((rows, hidden), (hidden, vocab)))
    clock.start()
    a @ b
    clock.mark()
    return 2 * rows * hidden * vocab / clock.intervals()[0]
