"""The matmul family: mm and bmm have rows, the others are compositions."""

from __future__ import annotations

from ..record import aten
from .batching import batched_matmul, matmul
from .table import bilinear, composite

bilinear(aten.mm.default, lambda ct, a, b: ct @ b.mH, lambda ct, a, b: a.mH @ ct, batch=matmul)
bilinear(
    aten.bmm.default,
    lambda ct, a, b: ct.call(aten.bmm.default, b.mH),
    lambda ct, a, b: a.mH.call(aten.bmm.default, ct),
    batch=batched_matmul,
)


def _scaled(x, factor):
    return x if factor == 1 else x * factor


def _added(product, c, beta, alpha):
    product = _scaled(product, alpha)
    return product if beta == 0 else product + _scaled(c, beta)


composite(aten.addmm.default, lambda c, a, b, beta=1, alpha=1: _added(a @ b, c, beta, alpha))
composite(aten.addmv.default, lambda c, a, b, beta=1, alpha=1: _added(_mv(a, b), c, beta, alpha))
composite(
    aten.baddbmm.default, lambda c, a, b, beta=1, alpha=1: _added(a.call(aten.bmm.default, b), c, beta, alpha)
)
composite(
    aten.addbmm.default,
    lambda c, a, b, beta=1, alpha=1: _added(a.call(aten.bmm.default, b).sum([0]), c, beta, alpha),
)
composite(aten.addr.default, lambda c, a, b, beta=1, alpha=1: _added(a.reshape(-1, 1) * b, c, beta, alpha))


def _mv(a, b):
    return (a @ b.reshape(-1, 1)).reshape(a.shape[0])


composite(aten.mv.default, _mv)
composite(aten.dot.default, lambda a, b: (a * b).sum())
composite(aten.vdot.default, lambda a, b: (a.conj() * b).sum())


def _trilinear(a, b, c, expand_a, expand_b, expand_c, sums, unroll=1):
    """The sum over some axes of a product of three tensors, each missing some of the axes."""

    def grown(x, dims):
        rank = x.ndim + len(dims)
        sizes = iter(x.shape)
        return x.reshape([1 if i in {d % rank for d in dims} else next(sizes) for i in range(rank)])

    return (grown(a, expand_a) * grown(b, expand_b) * grown(c, expand_c)).sum(list(sums))


composite(aten._trilinear.default, _trilinear)
