"""Seeing it: printed graphs, FXFUNC_DUMP, and FXFUNC_DEBUG=2, which verifies every graph and names the pass that broke it."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxfunc
from fxfunc.errors import InvalidGraph
from fxfunc.passes import config, dump, pipeline
from fxfunc.passes.graph import Graph, Val

aten = torch.ops.aten
HERE = Path(__file__).name


def line_of(function, text):
    """`file:line` where a function's source holds the text."""
    lines, first = inspect.getsourcelines(function)
    return f"{HERE}:{first + next(i for i, line in enumerate(lines) if text in line)}"


# ----- printing -------------------------------------------------------------------------------------------------------


def loss(w, x):
    y = (x @ w).sin()
    return y.sum() * 2.5


def test_a_printed_graph_shows_types_arguments_and_the_users_line():
    text = str(fxfunc.make_graph(loss)(torch.randn(3, 2), torch.randn(4, 3)))
    assert text == "\n".join(
        [
            "graph(x: f32[3,2], x_2: f32[4,3]):",
            f"  mm: f32[4,2] = aten.mm.default(x_2, x)   # {line_of(loss, 'x @ w')}",
            f"  sin: f32[4,2] = aten.sin.default(mm)   # {line_of(loss, '.sin()')}",
            f"  sum_1: f32[] = aten.sum.default(sin)   # {line_of(loss, 'y.sum')}",
            f"  mul: f32[] = aten.mul.Tensor(sum_1, 2.5)   # {line_of(loss, '2.5')}",
            "  return mul",
        ]
    )


def test_derivatives_keep_the_line_of_what_they_differentiate():
    text = str(fxfunc.make_graph(fxfunc.grad(loss))(torch.randn(3, 2), torch.randn(4, 3)))
    (cos,) = re.findall(r"aten\.cos\.default.*# (.*)", text)
    assert cos == line_of(loss, ".sin()")


def test_regions_are_indented_with_their_own_types():
    f = fxfunc.vmap(lambda x: fxfunc.scan(lambda c, r: (c * r, c.sin()), x[0], x))
    lines = str(fxfunc.make_graph(f)(torch.randn(7, 5, 2, dtype=torch.float64))).splitlines()
    depth = {line.strip().split("(")[0].split(":")[0]: len(line) - len(line.lstrip()) for line in lines}
    assert depth["graph"] == 0 and depth["map_1"] == 2 and depth["scan"] == 6
    bodies = [line.strip() for line in lines if line.strip().startswith("body(")]
    assert bodies == ["body(x: f64[5,2]):", "body(x: f64[2], x_2: f64[2]):"]
    assert "length=7" in str(lines) and "length=5, reverse=False" in str(lines)


def test_every_kind_of_argument_prints():
    def f(x):
        values = (
            torch.tensor([1.0, 2.0]),
            x.to(torch.float16),
            torch.full((2,), True),
            x.clamp(max=float("inf")),
        )
        return values, torch.stack([x, x]), torch.zeros(2, dtype=torch.complex64), x.max(0)

    text = str(fxfunc.make_graph(f)(torch.randn(2)))
    for part in (
        "Literal([1.0, 2.0])",
        "dtype=torch.float16",
        "f16[2]",
        "bool[2]",
        "c64[2]",
        "inf",
        "[x, x]",
        "(f32[], i64[])",
    ):
        assert part in text
    lowered = fxfunc.jit(f).lower(torch.randn(2))
    assert lowered.as_text() == str(lowered.graph)


def test_symbolic_sizes_print_by_name():
    x = fxfunc.spec(torch.randn(4, 3), {0: fxfunc.Dim("T")})
    text = fxfunc.jit(lambda x: torch.cat([x, x]).reshape(-1)).lower(x).as_text()
    assert "x: f32[T,3]" in text and "f32[2*T,3]" in text and "f32[6*T]" in text


# ----- dumps ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch, fxfunc

def loss(w, x):
    return (x @ w).tanh().square().sum()

w, x = torch.randn(3, 2), torch.randn(4, 5, 3)
per_example = fxfunc.vmap(fxfunc.grad(loss), (None, 0))
lowered = fxfunc.jit(per_example).lower(w, fxfunc.spec(x, {0: fxfunc.Dim("T")}))
lowered.compile()
lowered.compile(target="cuda:90")
fxfunc.jvp(lambda w: loss(w, x), (w,), (w,))
fxfunc.hessian(lambda w: loss(w, x))(w)
(fxfunc.vmap(lambda x: x.sin())(x.requires_grad_()).sum()).backward()
"""


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("dump")
    (folder / "model.py").write_text(SCRIPT)
    environment = {
        **os.environ,
        "FXFUNC_DUMP": str(folder / "graphs"),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    subprocess.run([sys.executable, "model.py"], cwd=folder, check=True, env=environment)
    return [(path.name, path.read_text()) for path in sorted((folder / "graphs").iterdir())]


def test_a_dump_has_a_numbered_file_for_each_transform_and_pass(dumped):
    numbers, names = zip(*(name.split("-", 1) for name, _ in dumped), strict=True)
    assert [int(n) for n in numbers] == list(range(len(dumped)))
    passes = "capture grad map dce lower orient peephole place fuse jvp jacfwd cut-primal cut-linear backward"
    assert {f"{name}.txt" for name in passes.split()} <= set(names)
    assert [n for n in names if n in ("grad.txt", "map.txt", "dce.txt", "lower.txt", "peephole.txt")][:5] == [
        "grad.txt", "map.txt", "dce.txt", "lower.txt", "peephole.txt",
    ]  # fmt: skip


def test_dumped_graphs_are_typed_text_with_indented_regions(dumped):
    for name, text in dumped:
        if name.endswith(".txt"):
            lines = text.splitlines()
            assert lines[0].startswith("graph(") and lines[-1].startswith("  return ") and text.endswith("\n")
            assert all(re.match(r" +(\w+: .+ = .+|body\(.*\):|return .+)", line) for line in lines[1:])
    before = next(text for name, text in dumped if name.endswith("-map.txt"))
    after = next(text for name, text in dumped if name.endswith("-lower.txt"))
    assert "fxfunc.map(" in before and re.search(r"^ {6}tanh: f32\[5,2\] = .*# model.py:5$", before, re.M)
    assert "fxfunc.map(" not in after and re.search(
        r"^  tanh: f32\[(T,5|5\*T),2\] = .*# model.py:5$", after, re.M
    )


def test_a_dump_has_the_source_of_every_kernel_and_program(dumped):
    fused = next(text for name, text in dumped if name.endswith("-fuse.txt"))
    kernels = set(re.findall(r"fxfunc\.kernel\((\w+)", fused))
    sources = {
        re.fullmatch(r"\d+-kernel-(\w+)\.py", name)[1]: text for name, text in dumped if "-kernel-" in name
    }
    assert kernels and kernels == set(sources)
    assert all(f"def {name}(" in text and "@triton.jit" in text for name, text in sources.items())
    programs = [text for name, text in dumped if name.endswith("-program.py")]
    assert programs and all(text.startswith("def program(tensors):") for text in programs)


def test_nothing_is_written_unless_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("FXFUNC_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    fxfunc.jit(lambda x: x.sin() + 123.25)(torch.ones(2))
    assert not os.listdir(tmp_path)


def test_a_dump_may_start_while_the_process_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("FXFUNC_DUMP", str(tmp_path / "new" / "folder"))
    fxfunc.make_graph(lambda x: x.sin() + 321.25)(torch.ones(2))
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert "321.25" in path.read_text()


# ----- FXFUNC_DEBUG ---------------------------------------------------------------------------------------------------


def graph_of(build, *vals):
    """A graph whose calls `build(call, *inputs)` makes, each with the val that is given for it."""
    fx = torch.fx.Graph()
    inputs = [fx.placeholder(f"x{i}") for i in range(len(vals))]
    for n, val in zip(inputs, vals, strict=True):
        n.meta["val"] = val

    def call(op, args, val, **kwargs):
        node = fx.call_function(op, args, kwargs)
        node.meta["val"] = val
        return node

    fx.output((build(call, *inputs),))
    return Graph(fx)


F2, F3 = (Val((n,), torch.float32, torch.device("cpu")) for n in (2, 3))


def _uses_a_later_value(call, x):
    first = call(aten.sin.default, (x,), F2)
    second = call(aten.cos.default, (x,), F2)
    first.args = (second,)
    return first


INVALID = {
    "wrong shape": (lambda call, x: call(aten.sin.default, (x,), F3), "has val f32\\[3\\], not f32\\[2\\]"),
    "wrong dtype": (
        lambda call, x: call(aten.sin.default, (x,), Val((2,), torch.float64, F2.device)),
        "f64\\[2\\], not f32",
    ),
    "no val": (lambda call, x: call(aten.sin.default, (x,), None), "has val None"),
    "a write": (lambda call, x: call(aten.add_.Tensor, (x, x), F2), "writes in place"),
    "no operator": (lambda call, x: call(torch.sin, (x,), F2), "no operator of a graph"),
    "a later value": (_uses_a_later_value, "a later one"),
}  # fmt: skip


@pytest.mark.parametrize("what", INVALID)
def test_debug_names_the_pass_that_made_a_graph_invalid(what, monkeypatch):
    build, message = INVALID[what]
    monkeypatch.setattr(config, "DEBUG", 2)
    monkeypatch.setattr(pipeline, "peephole", lambda graph: graph_of(build, F2))
    with pytest.raises(InvalidGraph, match=f"after peephole: .*{message}"):
        fxfunc.jit(lambda x: x.tan()).lower(torch.ones(2)).compile()


def test_an_invalid_body_is_found_inside_its_region(monkeypatch):
    monkeypatch.setattr(config, "DEBUG", 2)
    graph = fxfunc.make_graph(fxfunc.vmap(lambda x: x.sin() * 7.25))(torch.ones(3, 2))
    dump.saw("good", graph)
    (node,) = (n for n in graph.nodes if n.target.__name__ == "map")
    node.args[0].nodes[0].meta["val"] = F3
    with pytest.raises(InvalidGraph, match="after bad: .*has val"):
        dump.saw("bad", graph)
    node.args[0].nodes[0].meta["val"] = F2


def test_debug_verifies_every_pass_of_valid_programs(monkeypatch, capsys):
    monkeypatch.setattr(config, "DEBUG", 2)
    body = lambda c, x: (c * x.sin() + 1.125, c.sum())
    f = lambda c, xs: fxfunc.scan(body, c, xs)[1].sum()
    fxfunc.vmap(fxfunc.hessian(f), (0, None))(torch.randn(2, 3), torch.randn(4, 3))
    err = capsys.readouterr().err
    assert {"capture", "jacfwd", "map", "dce", "lower", "peephole"} <= set(
        re.findall(r"^([\w-]+) +\d+ nodes$", err, re.M)
    )


def test_higher_levels_print_graphs_then_sources(monkeypatch, capsys):
    for level, graphs, sources in ((1, False, False), (2, False, False), (3, True, False), (4, True, True)):
        monkeypatch.setattr(config, "DEBUG", level)
        fxfunc.jit(lambda x, level=level: x.sin() * (level + 0.375))(torch.ones(2))
        err = capsys.readouterr().err
        assert ("graph(x: f32[2])" in err, "def program" in err, bool(err)) == (graphs, sources, level > 1)
