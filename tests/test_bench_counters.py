"""fxfunc.bench.counters against FlopCounterMode and counts made by hand, and fxfunc.bench.peaks."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, hessian, vmap
from torch.nn.functional import conv2d, cross_entropy, linear, mse_loss, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import fxfunc
from fxfunc.bench import peaks
from fxfunc.bench.counters import AMENDED, count, graph_flops, touched

aten = torch.ops.aten


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def random(*shape: int, needs_grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(needs_grad)


X, COLUMN, MATRIX = ones(4, 8), ones(4, 1), ones(3, 3)


def maml(api):
    """Two inner steps, second order, over tasks: the maml25 workload in small."""

    def loss(params, x, y):
        return mse_loss(linear(linear(x, params["w0"], params["b0"]).relu(), params["w1"]), y)

    def task(params, xs, ys, xq, yq):
        for _ in range(2):
            grads = api.grad(loss)(params, xs, ys)
            params = {name: p - 0.01 * grads[name] for name, p in params.items()}
        return loss(params, xq, yq)

    return api.grad(lambda params, *tasks: api.vmap(task, (None, 0, 0, 0, 0))(params, *tasks).mean())


def maml_inputs():
    params = {"w0": random(8, 1), "b0": random(8), "w1": random(1, 8)}
    return params, *(random(5, 4, 1) for _ in range(4))


# ----- flops, as FlopCounterMode counts them --------------------------------------------------------------------------


def run_mlp():
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    cross_entropy(net(random(7, 6)), torch.tensor([0, 1, 2, 0, 1, 2, 0])).backward()


def run_per_sample_gradients():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    )
    params = {name: p.detach() for name, p in net.named_parameters()}
    loss = lambda params, x, y: cross_entropy(functional_call(net, params, (x[None],)), y[None])
    vmap(grad(loss), (None, 0, 0))(params, random(5, 1, 6, 6), torch.arange(5) % 3)


def run_attention(needs_grad=True, **options):
    q, k, v = (random(2, 3, 4, 8, needs_grad=needs_grad) for _ in range(3))
    out = scaled_dot_product_attention(q, k, v, **options)
    if needs_grad:
        out.sum().backward()


def run_convolutions():
    x, w = random(2, 4, 9, 9, needs_grad=True), random(6, 2, 3, 3, needs_grad=True)
    conv2d(x, w, random(6), stride=2, padding=1, groups=2).sum().backward()
    torch.nn.functional.conv_transpose1d(random(2, 4, 5, needs_grad=True), random(4, 3, 2)).sum().backward()


def run_inference():
    with torch.inference_mode():  # composite calls reach the mode whole
        linear(random(5, 6), random(4, 6), random(4)).matmul(random(3, 4, 2))


PROGRAMS = {
    "mlp": run_mlp,
    "vmap(grad(cnn))": run_per_sample_gradients,
    "bmm": lambda: torch.bmm(random(3, 2, 4), random(3, 4, 5)),
    "addmm, baddbmm": lambda: (
        torch.addmm(random(5), random(2, 3), random(3, 5)).sum()
        + torch.baddbmm(random(4, 2, 5), random(4, 2, 3), random(4, 3, 5)).sum()
    ),
    "convolution backward": run_convolutions,
    "attention": run_attention,
    "attention that is composed": lambda: run_attention(attn_mask=torch.zeros(4, 4, requires_grad=True)),
    "einsum": lambda: torch.einsum("bij,kj->bik", random(3, 2, 4), random(5, 4)),
    "hessian": lambda: hessian(lambda v: (MATRIX @ v).tanh().square().sum())(ones(3)),
    "mv, addmv, dot": lambda: (
        MATRIX.mv(ones(3)).dot(ones(3)) + torch.addmv(ones(3), MATRIX, ones(3)) + torch.vdot(ones(3), ones(3))
    ),
    "maml": lambda: maml(torch.func)(*maml_inputs()),
    "inference": run_inference,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_flops_are_those_of_flop_counter_mode(name):
    with FlopCounterMode(display=False, custom_mapping=AMENDED) as reference:
        PROGRAMS[name]()
    assert count(PROGRAMS[name])["flops"] == reference.get_total_flops() > 0


def test_flops_of_attention_by_hand():
    one_product = 2 * 4 * 4 * 8  # multiply-adds of [4, 8] @ [8, 4], twice
    assert count(run_attention, False)["flops"] == 2 * 3 * (2 * one_product)
    # backward: the scores again, then the gradients of values, probabilities, queries and keys
    assert count(run_attention)["flops"] == 2 * 3 * ((2 + 5) * one_product)


def test_flops_of_grouped_convolutions_by_hand():
    """FlopCounterMode lets every group see all channels in the weight's gradient: `groups` times too many."""
    # two a multiply-add: places of the output, its channels, channels of a group, kernel
    once = 2 * (2 * 5 * 5) * 6 * 2 * (3 * 3)

    def run():
        x, w = random(2, 4, 9, 9, needs_grad=True), random(6, 2, 3, 3, needs_grad=True)
        conv2d(x, w, stride=2, padding=1, groups=2).sum().backward()

    assert count(run)["flops"] == 3 * once
    per_sample = vmap(grad(lambda w, x: conv2d(x[None], w).square().sum()), (None, 0))
    one = 2 * (4 * 4) * 3 * 2 * (3 * 3)
    assert count(per_sample, random(3, 2, 3, 3), random(64, 2, 6, 6))["flops"] == 64 * 2 * one


@pytest.mark.parametrize(
    "name", ["mlp", "bmm", "addmm, baddbmm", "einsum", "maml", "convolutions without groups"]
)
def test_without_what_is_amended_flops_are_those_of_flop_counter_mode_as_it_is(name):
    call = PROGRAMS.get(name) or (
        lambda: conv2d(random(2, 4, 9, 9, needs_grad=True), random(6, 4, 3, 3)).sum().backward()
    )
    with FlopCounterMode(display=False) as reference:
        call()
    assert count(call)["flops"] == reference.get_total_flops() > 0


# ----- ops and bytes by hand ------------------------------------------------------------------------------------------

COUNTED = {  # call: (ops, flops, bytes)
    "pointwise": (lambda: torch.relu(X), (1, 0, 128 + 128)),
    "with a number": (lambda: X * 2.0, (1, 0, 128 + 128)),
    "matrix product": (lambda: torch.mm(ones(2, 3), ones(3, 4)), (3, 48, 24 + 48 + (24 + 48 + 32))),
    "of float64": (lambda: torch.zeros(4, 8, dtype=torch.float64), (1, 0, 256)),
    "to integers": (lambda: X.to(torch.int64), (1, 0, 128 + 256)),
    "an operand twice": (lambda: X * X, (1, 0, 128 + 128)),
    "an operand and its transpose": (lambda: MATRIX @ MATRIX.t(), (1, 54, 36 + 36)),
    "a broadcast operand": (lambda: X + COLUMN, (1, 0, 128 + 16 + 128)),
    "an expanded operand": (lambda: X + COLUMN.expand(4, 8), (1, 0, 128 + 16 + 128)),
    "half an operand": (lambda: torch.relu(X[:2]), (1, 0, 64 + 64)),
    "every other column": (lambda: torch.relu(X[:, ::2]), (1, 0, 64 + 64)),
    "overlapping windows": (lambda: torch.relu(ones(10).unfold(0, 4, 1)), (2, 0, 40 + (40 + 112))),
    "a reduction": (lambda: X.sum(1), (1, 0, 128 + 16)),
    "two results": (lambda: X.max(1), (1, 0, 128 + 16 + 32)),
    "in place": (lambda: X.clone().add_(COLUMN), (2, 0, (128 + 128) + (128 + 16 + 128))),
    "into a result": (lambda: torch.add(X, COLUMN, out=torch.empty(4, 8)), (1, 0, 128 + 16 + 128)),
    "a copy": (lambda: torch.empty(4, 8).copy_(COLUMN), (1, 0, 16 + 128)),
    "a fill": (lambda: torch.empty(4, 8).fill_(1.0), (1, 0, 128)),
    "a fill at random": (lambda: torch.empty(4, 8).normal_(), (1, 0, 128)),
    "zeros of a shape": (lambda: torch.zeros_like(X).new_ones(2), (2, 0, 128 + 8)),
    "several tensors": (lambda: torch._foreach_mul_([ones(2), ones(3)], 2.0), (3, 0, 20 + (20 + 20))),
    "a number on the host": (lambda: COLUMN[0].item(), (1, 0, 4)),
    "nothing": (lambda: torch.relu(ones(0)), (0, 0, 0)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_by_hand(name):
    call, expected = COUNTED[name]
    assert tuple(count(call).values()) == expected


VIEWS = {
    "views": lambda: X.t().expand(8, 4).unsqueeze(0).squeeze(0)[1:].view(7, 4).detach().unbind(),
    "reshape": lambda: X.reshape(8, 4).contiguous(),
    "in-place views": lambda: X.detach().unsqueeze_(0).transpose_(0, 1),
    "unsafe view": lambda: aten._unsafe_view(X, [32]),
    "as_strided": lambda: X.as_strided((2,), (1,), 3),
    "dtype that it has": lambda: X.to(torch.float32),
    "real and imaginary": lambda: torch.view_as_real(torch.view_as_complex(X.view(4, 4, 2))),
    "allocations": lambda: torch.empty_like(X).new_empty(3),
    "questions": lambda: (X.is_same_size(COLUMN), X.size(0), X.is_contiguous()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_and_allocations_count_nothing(name):
    assert count(VIEWS[name]) == {"ops": 0, "flops": 0, "bytes": 0}


def test_inside_vmap_and_grad_the_batched_calls_are_counted():
    batched = vmap(grad(lambda w, x: (x @ w).square().sum()), (None, 0))
    counts = count(batched, ones(3), ones(5, 3))
    one_by_one = count(
        lambda: [grad(lambda w, x: (x @ w).square().sum())(ones(3), ones(3)) for _ in range(5)]
    )
    assert counts["flops"] == 2 * 5 * 3
    assert 0 < counts["ops"] < one_by_one["ops"]


# ----- graphs ---------------------------------------------------------------------------------------------------------


def is_op(node: torch.fx.Node) -> bool:
    """By the schema alone: what gives no view of its operand."""
    return hasattr(node.target, "_schema") and node.target._schema.returns[0].alias_info is None


def product_flops(node: torch.fx.Node) -> int:
    """Of mm, addmm, bmm and baddbmm: twice the result's elements times the inner size."""
    position = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(
        getattr(node.target, "__name__", "").split(".")[0]
    )
    if position is None:
        return 0
    return 2 * torch.Size(node.meta["val"].shape).numel() * node.args[position].meta["val"].shape[-1]


def test_counts_of_a_compiled_program_are_those_of_its_graph():
    inputs = maml_inputs()
    compiled = fxfunc.jit(maml(fxfunc)).lower(*inputs).compile("eager")
    counts, walked = count(compiled, *inputs), compiled.graph.nodes
    assert counts["ops"] == sum(map(is_op, walked))
    assert counts["flops"] == sum(map(product_flops, walked)) > 0
    assert graph_flops(compiled.graph) == counts["flops"]


def test_a_loop_counts_as_often_as_it_runs():
    w = random(4, 4)
    powers = lambda x: fxfunc.fori_loop(0, 7, lambda i, x: (w @ x).tanh(), x)
    compiled = fxfunc.jit(powers).lower(random(4, 4)).compile("eager")
    assert graph_flops(compiled.graph) == 7 * (2 * 4**3) == count(compiled, random(4, 4))["flops"]


@pytest.mark.parametrize("function", [torch.nn.functional.softmax, run_attention])
def test_a_graph_without_products_has_no_flops_and_fused_attention_has(function):
    if function is run_attention:
        qkv = [random(2, 3, 4, 8) for _ in range(3)]
        compiled = fxfunc.jit(scaled_dot_product_attention).lower(*qkv).compile("eager")
        assert graph_flops(compiled.graph) == count(compiled, *qkv)["flops"] == 2 * 3 * 2 * (2 * 4 * 4 * 8)
    else:
        compiled = fxfunc.jit(lambda x: x.softmax(0)).lower(X).compile("eager")
        assert graph_flops(compiled.graph) == 0


def test_parts_of_one_storage_add_up_to_no_more_than_it_holds():
    assert touched([X[:2], X[2:]]) == 128
    assert touched([X[:3], X[1:]]) == 128
    assert touched([X[:1], X[:1]]) == 32


# ----- peaks ----------------------------------------------------------------------------------------------------------


def test_peaks_are_plausible_and_leave_the_thread_count(monkeypatch):
    monkeypatch.setattr(peaks, "GEMM_S", 0.05)
    monkeypatch.setattr(peaks, "STREAM_S", 0.01)
    monkeypatch.setattr(peaks, "GEMM_SIZES", {"cpu": (256,)})
    monkeypatch.setattr(peaks, "array_bytes", lambda device: 2**22)
    before = torch.get_num_threads()
    found = peaks.measure("cpu", 1)
    assert torch.get_num_threads() == before
    assert set(found) == {"flops_per_s", "bytes_per_s"}
    assert 1e8 < found["flops_per_s"] < 1e15 and 1e7 < found["bytes_per_s"] < 1e14


def test_arrays_of_the_triad_do_not_fit_the_cache(tmp_path, monkeypatch):
    for index, size in enumerate(("32K", "1024K", "48M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(peaks, "CACHE", tmp_path)
    assert peaks.array_bytes("cpu") == 4 * 48 * 2**20
    (tmp_path / "index2" / "size").write_text("768M\n")
    assert peaks.array_bytes("cpu") == peaks.LARGEST
    monkeypatch.setattr(peaks, "CACHE", tmp_path / "absent")
    assert peaks.array_bytes("cpu") == 128 * 2**20
