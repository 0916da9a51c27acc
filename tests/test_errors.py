"""Bad input: the exception of fxfunc.errors, the type torch.func raises there, what, where and what to do about it."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

import fxfunc
from fxfunc import errors

F64 = torch.float64
X = torch.tensor([0.3, -0.7, 1.1], dtype=F64)
M = torch.arange(6.0, dtype=F64).reshape(2, 3)
I3 = torch.arange(3)
META = torch.ones(3, dtype=F64, device="meta")
HERE = str(Path(__file__))

ADVICE = re.compile(
    r"\)\. (Use|Pass|Return|Give|Move|Convert|Call|Leave|Register|The change would be lost: write|Compare)\b"
)


def total(x):
    return (x * x).sum()


def raised_by(program, T):
    with pytest.raises(Exception) as raised:
        program(T)
    return raised.value


def check(error, kind, *named):
    """The class, that the message names these things and says what to do, and that the line is in this file."""
    assert type(error) is kind
    text = str(error)
    for name in named:
        assert name in text, text
    assert error.source in text
    assert ADVICE.search(text), text
    file, line = error.source.rsplit(":", 1)
    assert file == HERE
    return int(line)


def user_lines(error):
    """The lines of this file in the traceback, outermost first."""
    return [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == HERE]


# ----- calls that torch.func refuses too: a program over a namespace, our class, what the message names --------------

ARGNUMS = [1, -2, (0, 0), (), "a", 0.5, [0], True, None, (0, 1), (0, "a"), (0, -1)]
BAD = {
    f"{name} argnums={argnums!r}": (
        lambda T, name=name, argnums=argnums: getattr(T, name)(total, argnums=argnums)(X),
        errors.BadArgnums,
        ("argnums", "1 positional"),
    )
    for name in ("grad", "grad_and_value", "jacrev", "jacfwd", "hessian")
    for argnums in ARGNUMS
    if not (argnums in (True, None) and name in ("jacfwd", "hessian"))
}

SCALARS = {
    "vector": (lambda x: x * 2, "(3,)"),
    "one element": (lambda x: x.sum().reshape(1), "(1,)"),
    "tuple": (lambda x: (x.sum(),), "tuple"),
    "dict": (lambda x: {"a": x.sum()}, "dict"),
    "float": (lambda x: 1.0, "float"),
    "None": (lambda x: None, "NoneType"),
    "complex": (lambda x: (x * 1j).sum(), "complex128"),
}
BAD |= {
    f"{name} of {kind}": (
        lambda T, name=name, f=f: getattr(T, name)(f)(X),
        errors.NonScalarOutput,
        (name, named, "vjp"),
    )
    for name in ("grad", "grad_and_value")
    for kind, (f, named) in SCALARS.items()
}

AUX = {
    "grad": lambda T, f: T.grad(f, has_aux=True)(X),
    "vjp": lambda T, f: T.vjp(f, X, has_aux=True),
    "jvp": lambda T, f: T.jvp(f, (X,), (X,), has_aux=True),
    "jacrev": lambda T, f: T.jacrev(f, has_aux=True)(X),
    "jacfwd": lambda T, f: T.jacfwd(f, has_aux=True)(X),
}
BAD |= {
    f"{name} has_aux of {kind}": (
        lambda T, call=call, f=f: call(T, f),
        errors.TypeOfArgument,
        (name, "has_aux", "(output, aux)"),
    )
    for name, call in AUX.items()
    for kind, f in {
        "tensor": total,
        "three": lambda x: (total(x), x, x),
        "list": lambda x: [total(x), x],
    }.items()
}

RESULTS = {
    "vjp": lambda T, f: T.vjp(f, X),
    "jvp": lambda T, f: T.jvp(f, (X,), (X,)),
    "jacrev": lambda T, f: T.jacrev(f)(X),
    "jacfwd": lambda T, f: T.jacfwd(f)(X),
}
BAD |= {
    f"{name} of a function that returns {kind}": (
        lambda T, call=call, f=f: call(T, f),
        errors.TypeOfArgument,
        (name, kind if kind != "tuple" else "float", "only tensors"),
    )
    for name, call in RESULTS.items()
    for kind, f in {"float": lambda x: 1.0, "tuple": lambda x: (x, 1.0), "nothing": lambda x: ()}.items()
    if (name, kind) not in {("jacrev", "nothing"), ("jacfwd", "nothing"), ("jvp", "nothing")}
}

BAD |= {
    "grad of a float": (lambda T: T.grad(lambda x: X.sum())(2.0), errors.NoTensorInputs, ("grad",)),
    "grad without arguments": (
        lambda T: T.grad(lambda: X.sum())(),
        errors.NoTensorInputs,
        ("grad", "there are none"),
    ),
    "vjp of a float": (lambda T: T.vjp(lambda x: X * x, 2.0), errors.NoTensorInputs, ("vjp",)),
    "jvp of a float": (lambda T: T.jvp(lambda x: X * x, (2.0,), (1.0,)), errors.NoTensorInputs, ("jvp",)),
    "jvp of nothing": (lambda T: T.jvp(lambda: X, (), ()), errors.NoTensorInputs, ("jvp",)),
    "grad of a number in a structure": (
        lambda T: T.grad(lambda d: d["a"].sum())({"a": X, "b": 2}),
        errors.TypeOfArgument,
        ("grad", "int"),
    ),
    "grad of None in a structure": (
        lambda T: T.grad(lambda d: d[0].sum())([X, None]),
        errors.TypeOfArgument,
        ("grad", "NoneType"),
    ),
}

INTEGERS = {
    "grad": lambda T, i: T.grad(lambda x: (x * 1.0).sum())(i),
    "grad of a structure": lambda T, i: T.grad(lambda d: (d["a"] * d["b"]).sum())({"a": X, "b": i}),
    "vjp": lambda T, i: T.vjp(lambda x: x * 1.0, i),
    "jvp": lambda T, i: T.jvp(lambda x: x * 1.0, (i,), (i,)),
    "jacrev": lambda T, i: T.jacrev(lambda x: x * 1.0)(i),
    "jacfwd": lambda T, i: T.jacfwd(lambda x: x * 1.0)(i),
}
BAD |= {
    f"{name} of {dtype}": (
        lambda T, call=call, dtype=dtype: call(T, I3.to(dtype)),
        errors.NotDifferentiable,
        (name.split()[0], str(dtype), "Convert it to float"),
    )
    for name, call in INTEGERS.items()
    for dtype in (torch.int64, torch.uint8, torch.bool)
}

IN_DIMS = {
    "str": (lambda T: T.vmap(total, in_dims="a")(M), "'a'"),
    "None": (lambda T: T.vmap(total, in_dims=None)(M), "None"),
    "dict": (lambda T: T.vmap(total, in_dims={"a": 0})(M), "dict"),
    "float": (lambda T: T.vmap(total, in_dims=0.5)(M), "0.5"),
    "float inside": (lambda T: T.vmap(total, in_dims=(0.5,))(M), "0.5"),
    "str inside": (lambda T: T.vmap(total, in_dims=("a",))(M), "'a'"),
    "bool": (lambda T: T.vmap(total, in_dims=True)(M), "True"),
    "all None": (lambda T: T.vmap(total, in_dims=(None,))(M), "no argument is mapped"),
    "too large": (lambda T: T.vmap(total, in_dims=2)(M), "dim 2"),
    "too small": (lambda T: T.vmap(total, in_dims=-3)(M), "dim -3"),
    "0-d tensor": (lambda T: T.vmap(total)(X.sum()), "0 dimensions"),
    "too many": (lambda T: T.vmap(total, in_dims=(0, 0))(M), "1 arguments"),
    "too few": (lambda T: T.vmap(torch.add, in_dims=(0,))(M, M), "2 arguments"),
    "other structure": (lambda T: T.vmap(lambda d: d[0], in_dims=({"a": 0},))((M, M)), "structure"),
    "other key": (lambda T: T.vmap(lambda d: d["a"], in_dims=({"b": 0},))({"a": M}), "structure"),
    "a structure for a tensor": (lambda T: T.vmap(total, in_dims=((0, 0),))(M), "structure"),
    "of a number": (lambda T: T.vmap(torch.mul, in_dims=(0, 0))(M, 2.0), "float"),
    "of a structure with a number": (lambda T: T.vmap(lambda d: d[0], in_dims=0)([M, 1]), "int"),
    "different sizes": (lambda T: T.vmap(torch.add)(M, M.T), "2, 3"),
    "no arguments": (lambda T: T.vmap(lambda: X)(), "without positional arguments"),
    "keyword arguments only": (lambda T: T.vmap(lambda a: a)(a=M), "without positional arguments"),
}
BAD |= {
    f"in_dims: {k}": (program, errors.BadInDims, ("vmap", named)) for k, (program, named) in IN_DIMS.items()
}

OUT_DIMS = {
    "str": (lambda T: T.vmap(torch.sin, out_dims="a")(M), "'a'"),
    "float": (lambda T: T.vmap(torch.sin, out_dims=0.5)(M), "0.5"),
    "too large": (lambda T: T.vmap(torch.sin, out_dims=2)(M), "2"),
    "too small": (lambda T: T.vmap(torch.sin, out_dims=-3)(M), "-3"),
    "too many": (lambda T: T.vmap(torch.sin, out_dims=(0, 0))(M), "structure"),
    "other number": (lambda T: T.vmap(lambda x: (x, x), out_dims=(0, 0, 0))(M), "structure"),
    "other key": (lambda T: T.vmap(lambda x: {"a": x, "b": x}, out_dims={"a": 0})(M), "structure"),
    "None of a mapped value": (lambda T: T.vmap(torch.sin, out_dims=None)(M), "depends on a mapped input"),
}
BAD |= {
    f"out_dims: {k}": (program, errors.BadOutDims, ("vmap", named))
    for k, (program, named) in OUT_DIMS.items()
}

BAD |= {
    f"vmap of a function that returns {kind}": (
        lambda T, f=f: T.vmap(f)(M),
        errors.TypeOfArgument,
        ("vmap", "only tensors"),
    )
    for kind, f in {"a number": lambda x: 1.0, "None": lambda x: None, "both": lambda x: (x, None)}.items()
}
BAD |= {
    "randomness": (
        lambda T: T.vmap(torch.sin, randomness="other")(M),
        errors.TypeOfArgument,
        ("'other'", "different"),
    ),
    "vmap chunk_size": (
        lambda T: T.vmap(torch.sin, chunk_size=0)(M),
        errors.TypeOfArgument,
        ("vmap", "chunk_size"),
    ),
    "jacrev chunk_size": (
        lambda T: T.jacrev(torch.sin, chunk_size=-1)(X),
        errors.TypeOfArgument,
        ("jacrev", "chunk_size"),
    ),
    "a draw": (
        lambda T: T.vmap(lambda x: x + torch.randn(3))(M),
        errors.RandomInVmap,
        ("aten.randn", "randomness"),
    ),
    "dropout": (
        lambda T: T.vmap(lambda x: torch.nn.functional.dropout(x))(M),
        errors.RandomInVmap,
        ("aten.bernoulli", "randomness"),
    ),
}

VJP = {
    "fewer": (lambda x: (x, x), lambda f: f((X,))),
    "a tensor for a tuple": (lambda x: (x, x), lambda f: f(X)),
    "a tuple for a tensor": (torch.sin, lambda f: f((X, X))),
    "a list for a tuple": (lambda x: (x, x), lambda f: f([X, X])),
    "another key": (lambda x: {"a": x}, lambda f: f({"b": X})),
    "another shape": (torch.sin, lambda f: f(X[:2])),
    "a number": (torch.sin, lambda f: f(1.0)),
}
BAD |= {
    f"vjp_fn with {kind}": (
        lambda T, f=f, call=call: call(T.vjp(f, X)[1]),
        errors.StructureMismatch,
        ("vjp_fn", "cotangent"),
    )
    for kind, (f, call) in VJP.items()
}
JVP = {
    "no tuple": lambda T: T.jvp(total, X, X),
    "tangents no tuple": lambda T: T.jvp(total, (X,), X),
    "lists": lambda T: T.jvp(total, [X], [X]),
    "more tangents": lambda T: T.jvp(total, (X,), (X, X)),
    "another structure": lambda T: T.jvp(lambda d: total(d["a"]), ({"a": X},), ({"b": X},)),
    "another shape": lambda T: T.jvp(total, (X,), (X[:2],)),
    "a number": lambda T: T.jvp(total, (X,), (1.0,)),
    "linearize: more tangents": lambda T: T.linearize(total, X)[1](X, X),
    "linearize: another shape": lambda T: T.linearize(total, X)[1](X[:2]),
    "linearize: another dtype": lambda T: T.linearize(total, X)[1](X.float()),
}
BAD |= {f"jvp with {kind}": (p, errors.StructureMismatch, ("jvp", "tangent")) for kind, p in JVP.items()}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    program, kind, named = BAD[name]
    error = raised_by(program, fxfunc)
    line = check(error, kind, *named)
    assert line in user_lines(error)
    assert isinstance(error, type(raised_by(program, torch.func)))


# ----- the value of a tensor ------------------------------------------------------------------------------------------

VALUES = {
    "if": (lambda x: x.sum() if x.sum() > 0 else -x.sum(), "bool(tensor)"),
    "while": (lambda x: x * 2 if (x < 9).all() else x, "bool(tensor)"),
    "and": (lambda x: (x > 0).any() and x.sum(), "bool(tensor)"),
    "in": (lambda x: x.sum() if 1.0 in x else x, "Tensor.item()"),
    "min": (lambda x: min(x[0], x[1]), "bool(tensor)"),
    "item": (lambda x: x * x.sum().item(), "Tensor.item()"),
    "int": (lambda x: x * int(x.sum()), "Tensor.item()"),
    "float": (lambda x: x * float(x.sum()), "Tensor.item()"),
    "complex": (lambda x: x * complex(x.sum()), "Tensor.item()"),
    "range": (lambda x: sum(x[k] for k in range(x.argmax())), "Tensor.item()"),
    "index of a list": (lambda x: x * [1.0, 2.0, 3.0][x.argmax()], "Tensor.item()"),
    "slice": (lambda x: x[: x.argmax()], "Tensor.item()"),
    "format": (lambda x: x * len(f"{x.sum():.2f}"), "format(tensor)"),
    "tolist": (lambda x: x * x.tolist()[0], "Tensor.tolist()"),
    "numpy": (lambda x: x * x.numpy()[0], "Tensor.numpy()"),
    "detached numpy": (lambda x: x * x.detach().cpu().numpy()[0], "Tensor.numpy()"),
    "np.asarray": (lambda x: x * np.asarray(x)[0], "numpy.asarray"),
    "torch.tensor": (lambda x: torch.tensor([x[0], x[1]]), "tensor of a list of tensors"),
    "torch.as_tensor": (lambda x: torch.as_tensor([x[0], [x[1]]]), "as_tensor of a list of tensors"),
    "new_tensor": (lambda x: x.new_tensor([x[0], 1.0]), "new_tensor of a list of tensors"),
    "torch.equal": (lambda x: x if torch.equal(x, x * 2) else -x, "aten.equal"),
    "torch.allclose": (lambda x: x if torch.allclose(x, x * 2) else -x, "aten.allclose"),
    "is_nonzero": (lambda x: x if x.sum().is_nonzero() else -x, "bool(tensor)"),
    "nonzero": (lambda x: x[x.nonzero()[:, 0]], "aten.nonzero"),
    "nonzero as a tuple": (lambda x: x[x.nonzero(as_tuple=True)], "aten.nonzero"),
    "torch.where of one": (lambda x: x[torch.where(x > 0)], "aten.nonzero"),
    "argwhere": (lambda x: torch.argwhere(x), "aten.nonzero"),
    "mask": (lambda x: x[x > 0], "aten.index"),
    "masked_select": (lambda x: x.masked_select(x > 0), "aten.masked_select"),
    "unique": (lambda x: x.unique(), "aten._unique2"),
    "unique_consecutive": (lambda x: x.unique_consecutive(), "aten.unique_consecutive"),
    "repeat_interleave": (lambda x: x.repeat_interleave((x > 0).long()), "aten.repeat_interleave"),
    "bincount": (lambda x: torch.bincount((x > 0).long()), "aten.bincount"),
}
INSIDE = {
    "jit": lambda f: fxfunc.jit(f)(X),
    "vmap": lambda f: fxfunc.vmap(f)(M),
    "jit of vmap": lambda f: fxfunc.jit(fxfunc.vmap(f))(M),
    "vmap of grad": lambda f: fxfunc.vmap(fxfunc.grad(lambda x: f(x).sum()))(M),
    "jvp": lambda f: fxfunc.jvp(f, (X,), (X,)),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("inside", [i for i in INSIDE if i != "jvp"])  # which captures with values at hand
def test_value_dependent_python(inside, name):
    f, named = VALUES[name]
    error = raised_by(lambda _: INSIDE[inside](f), None)
    line = check(error, errors.ValueDependent, named, "torch.where")
    assert isinstance(error, RuntimeError)
    assert line == f.__code__.co_firstlineno


@pytest.mark.parametrize(
    "name", [n for n in VALUES if n not in ("argwhere", "repeat_interleave", "bincount")]
)
def test_value_dependent_python_is_refused_by_torch_func_with_the_same_type(name):
    """torch.func maps the three exceptions one example at a time, which works if the shapes happen to agree."""
    f, _ = VALUES[name]
    assert isinstance(
        raised_by(lambda _: INSIDE["vmap"](f), None), type(raised_by(lambda T: T.vmap(f)(M), torch.func))
    )


@pytest.mark.parametrize("kind", ["closure", "argument"])
def test_values_of_tensors_that_are_closed_over_are_not_baked_in(kind):
    w = torch.tensor(2.0)
    f = (lambda x: x * w.item()) if kind == "closure" else (lambda x, w=w: x * float(w))
    with pytest.raises(errors.ValueDependent):
        fxfunc.jit(f)(X)


# ----- devices --------------------------------------------------------------------------------------------------------

DEVICES = {
    "add": (lambda x: x + META, "aten.add"),
    "dot": (lambda x: x @ META, "aten.dot"),
    "cat": (lambda x: torch.cat([x, META]), "aten.cat"),
    "where": (lambda x: torch.where(x > 0, x, META), "aten.where"),
    "index": (lambda x: x[torch.zeros(2, dtype=torch.int64, device="meta")], "aten.index"),
    "linear": (lambda x: torch.nn.functional.linear(x, META.reshape(1, 3)), "cpu, meta"),
}


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("inside", INSIDE)
def test_mixed_devices(inside, name):
    f, named = DEVICES[name]
    error = raised_by(lambda _: INSIDE[inside](f), None)
    line = check(error, errors.MixedDevices, named, "cpu", "meta", ".to(device)")
    assert isinstance(error, RuntimeError)
    assert line in (f.__code__.co_firstlineno, *user_lines(error))


# ----- ops without rules ----------------------------------------------------------------------------------------------


@torch.library.custom_op("fxfunc_test_errors::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x * 2


opaque.register_fake(torch.empty_like)
LIBRARY = torch.library.Library("fxfunc_test_errors", "FRAGMENT")
LIBRARY.define("bare(Tensor x) -> Tensor")
LIBRARY.impl("bare", lambda x: x * 2, "CPU")
LIBRARY.impl("bare", torch.empty_like, "Meta")
bare = torch.ops.fxfunc_test_errors.bare
RULES = {
    "grad": lambda op: fxfunc.grad(lambda x: op(x).sum())(X),
    "vjp": lambda op: fxfunc.vjp(op, X)[1](X),
    "jacrev": lambda op: fxfunc.jacrev(lambda x: op(x) * x)(X),
    "hessian": lambda op: fxfunc.hessian(lambda x: op(x).sum())(X),
    "vmap of grad": lambda op: fxfunc.vmap(fxfunc.grad(lambda x: op(x).sum()))(M),
    "jit of grad": lambda op: fxfunc.jit(fxfunc.grad(lambda x: op(x).sum()))(X),
    "jvp": lambda op: fxfunc.jvp(lambda x: op(x), (X,), (X,)),
    "jacfwd": lambda op: fxfunc.jacfwd(lambda x: op(x))(X),
    "linearize": lambda op: fxfunc.linearize(lambda x: op(x), X)[1](X),
}


@pytest.mark.parametrize("op", [bare, opaque], ids=["bare", "custom_op"])
@pytest.mark.parametrize("name", RULES)
def test_ops_without_a_rule(name, op):
    program = RULES[name]
    error = raised_by(program, op)
    line = check(
        error,
        errors.MissingRule,
        "fxfunc_test_errors.",
        "has no",
        "rule",
        "fxfunc.register_rule(fxfunc_test_errors.",
    )
    assert error.op.startswith("fxfunc_test_errors.") and isinstance(error, NotImplementedError)
    assert line == program.__code__.co_firstlineno


def test_an_op_without_a_batching_rule_runs_one_example_at_a_time_and_says_so():
    with pytest.warns(
        UserWarning, match=r"fxfunc_test_errors\.bare.*one example at a time.*fxfunc\.register_rule"
    ):
        torch.testing.assert_close(fxfunc.vmap(lambda x: bare(x))(M), M * 2)


# ----- compiled functions ---------------------------------------------------------------------------------------------

COMPILED = {
    "fewer arguments": (lambda f: f({"a": X}), "structure"),
    "more arguments": (lambda f: f({"a": X}, X, X, 2), "structure"),
    "another key": (lambda f: f({"b": X}, X, 2), "structure"),
    "a tuple for a dict": (lambda f: f((X,), X, 2), "structure"),
    "a number for a tensor": (lambda f: f({"a": X}, 1.0, 2), "float"),
    "another shape": (lambda f: f({"a": X}, X[:2], 2), "f64[2], not f64[3]"),
    "another dtype": (lambda f: f({"a": X.float()}, X, 2), "f32[3], not f64[3]"),
    "another device": (lambda f: f({"a": META}, X, 2), "meta"),
    "another plain value": (lambda f: f({"a": X}, X, 3), "3"),
    "another plain type": (lambda f: f({"a": X}, X, 2.0), "2.0"),
    "a keyword": (lambda f: f({"a": X}, X, n=2), "structure"),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_functions_refuse_other_structures(name):
    compiled = fxfunc.jit(lambda d, y, n: d["a"] * y * n).lower({"a": X}, X, 2).compile(backend="eager")
    call, named = COMPILED[name]
    error = raised_by(call, compiled)
    line = check(error, errors.StructureMismatch, named, "f64[3], f64[3]")
    assert isinstance(error, TypeError) and isinstance(error, ValueError)
    assert line == call.__code__.co_firstlineno


# ----- tensors that leave, states that would be lost --------------------------------------------------------------------------


def test_a_tensor_kept_from_a_capture_says_so():
    kept = []
    fxfunc.jit(lambda x: (kept.append(x * 2), x)[1])(X)
    error = raised_by(lambda _: kept[0] + 1, None)
    check(error, errors.UnsupportedInside, "left its capture", "aten.add", "Return the tensor")


@pytest.mark.parametrize("transform", [fxfunc.grad, fxfunc.jacfwd, fxfunc.vmap])
def test_writes_to_closures_inside_transforms(transform):
    w = X.clone()

    def f(x):
        w.add_(x)
        return (w * x).sum()

    error = raised_by(lambda _: transform(f)(X if transform is not fxfunc.vmap else M), None)
    line = check(error, errors.MutatedCapture, "aten.add_", "clone")
    assert line == f.__code__.co_firstlineno + 1
    torch.testing.assert_close(w, X)
    assert isinstance(error, RuntimeError)


def test_data_ptr_is_refused():
    error = raised_by(lambda _: fxfunc.jit(lambda x: x * x.data_ptr())(X), None)
    check(error, errors.UnsupportedInside, "data_ptr")


def test_inside_an_active_torch_func_transform():
    for call in (fxfunc.grad(total), fxfunc.vmap(total), fxfunc.jit(total)):
        error = raised_by(lambda _, call=call: torch.func.vmap(call)(M[None]), None)
        check(error, errors.NestedTorchFunc, "torch.func", "Use fxfunc")


def test_every_error_class_is_public_and_of_a_type_of_python():
    classes = errors.FxfuncError.__subclasses__()
    for c in classes:
        assert getattr(errors, c.__name__) is c and c.fix
        assert any(b.__module__ == "builtins" for b in c.__bases__)


OUT_OF_RANGE = {
    "sum": lambda x: x.sum(2),
    "mean": lambda x: x.mean(-3),
    "softmax": lambda x: x.softmax(2),
    "log_softmax": lambda x: x.log_softmax(-3),
    "permute": lambda x: x.permute(2, 3),
    "gather": lambda x: x.gather(2, torch.zeros(2, 3, dtype=torch.int64)),
}


@pytest.mark.parametrize("f", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_a_dim_out_of_range_is_no_other_dim(f):
    for wrapped, x in (
        (fxfunc.jit(f), torch.ones(2, 3)),
        (fxfunc.grad(lambda x: f(x).sum()), torch.ones(2, 3)),
        (fxfunc.vmap(f), torch.ones(4, 2, 3)),
    ):
        with pytest.raises(IndexError, match="out of range"):
            wrapped(x)


def test_a_write_through_a_view_of_another_dtype_raises():
    def f(x):
        y = x * 1
        y.view(torch.int32).mul_(2)
        return y

    with pytest.raises(errors.NotSupported, match="writing in place"):
        fxfunc.jit(f)(torch.ones(3))
