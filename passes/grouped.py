"""Gradients of convolutions as ATen computes them best. Entry point: `grouped`.

vmap of a convolution's weight gradient is one whose groups are the examples. For small images ATen takes longer for it than for a
copy of all windows and a batched product with that. Of an operand that only its shape is asked of no memory is written.
"""

from __future__ import annotations

from torch.fx import Node

from .dims import Dim, numel
from .graph import Graph, Val, substitute
from .record import Builder, Value, aten

MOST = 2**21  # elements of all windows

Env = dict[Node, object]


def grouped(graph: Graph) -> Graph:
    """The graph with products for those weight gradients that are faster so, and the others with nothing made for its shape."""
    b = Builder({})
    env: Env = {n: b.input(n.meta["val"], n.name) for n in graph.inputs}
    for n in graph.nodes:
        if n.target is not aten.convolution_backward.default:
            b.run([n], env)
            continue
        with b.at(n, "grouped"):
            env[n] = (None, _product(n, env), None) if _is_product(n) else _shapes_alone(n, env, b)
    return b.finish([None if n is None else env[n] for n in graph.outputs])


def _is_product(n: Node) -> bool:
    """True for the weight gradient alone of one image for each group, of few windows in all."""
    (grad, x, weight), (dilation, transposed, _, groups, wanted) = n.args[:3], n.args[6:]
    shapes = [_val(v).shape for v in (grad, x, weight)]
    if any(len(s) != 4 or any(isinstance(d, Dim) for d in s) for s in shapes):
        return False
    plain = list(wanted) == [False, True, False] and not transposed and all(d == 1 for d in dilation)
    windows = groups * numel(shapes[2][1:]) * numel(shapes[0][2:])
    return plain and groups > 1 and shapes[0][0] == 1 and 0 < windows <= MOST


def _shapes_alone(n: Node, env: Env, b: Builder) -> tuple:
    """The call; x is not read if no gradient of the weights is wanted, the weights not if none of x is."""
    args, wanted = [*substitute(n.args, env.__getitem__)], n.args[10]
    for i, is_read in ((1, wanted[1]), (2, wanted[0])):
        if not is_read and n.args[i].target is aten.full.default:
            args[i] = args[i].full([], 0).expand(list(args[i].shape))
    return b.emit(n.target, tuple(args), {})


def _product(n: Node, env: Env) -> Value:
    """[groups * out, in, height, width]: the sum over places of what is passed on at each and the window below it."""
    (grad, x), weight, groups = (env[v] for v in n.args[:2]), _val(n.args[2]).shape, n.args[9]
    (down, across), (top, left) = n.args[4], n.args[5]
    _, inner, height, width = weight
    x = x.reshape([groups, inner, *x.shape[2:]])
    if top or left:
        x = x.call(aten.constant_pad_nd.default, [left, left, top, top])
    windows = x.call(aten.unfold.default, 2, height, down).call(aten.unfold.default, 3, width, across)
    windows = windows.permute([0, 1, 4, 5, 2, 3]).reshape([groups, inner * height * width, -1])
    grad = grad.reshape([groups, weight[0] // groups, -1])
    return grad.call(aten.bmm.default, windows.mT).reshape(list(weight))


def _val(n: Node) -> Val:
    return n.meta["val"]
