"""The table: one row an op. Arguments come from a `Sample` s with size s.n; tests/test_rules.py runs every check on each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_harness import Case, recorded

import fxfunc

aten = torch.ops.aten
F32, BF16, C128 = torch.float32, torch.bfloat16, torch.complex128
CASES: list[Case] = []
# Where torch has a reverse formula alone, and under vmap over cotangents none or (cdist) a wrong one.
FIRST_ONLY = "jvp vmap_jvp jvp_vjp vjp_vjp no_grad vmap_vjp"


def case(name, f, args, *dtypes, **options) -> None:
    """Add a row."""
    CASES.append(
        Case(
            name,
            f,
            args,
            dtypes,
            **{k: frozenset(v.split()) if k == "skip" else v for k, v in options.items()},
        )
    )


# ----- elementwise ----------------------------------------------------------------------------------------------------
ANY = (
    "sin cos tan exp exp2 expm1 tanh sinh cosh asinh atan sigmoid erf erfc neg abs square sgn relu silu mish"
)
for _name in ANY.split():
    case(_name, getattr(torch, _name, None) or getattr(F, _name), lambda s: (s(2, s.n),), F32)
for _name in "log log2 log10 log1p sqrt rsqrt reciprocal lgamma digamma".split():
    case(_name, getattr(torch, _name), lambda s: (s.pos(s.n, 2),))
for _name in "asin acos atanh".split():
    case(_name, getattr(torch, _name), lambda s: (s.inside(-0.8, 0.8, s.n),))
case("acosh", torch.acosh, lambda s: (s.pos(s.n) + 1,))
case("polygamma", lambda a: torch.polygamma(1, a), lambda s: (s.pos(s.n),))
for _name in "floor ceil round trunc sign".split():
    case(_name, getattr(torch, _name), lambda s: (s(s.n),))
TESTS = (torch.isnan, torch.isinf, torch.isfinite, torch.signbit)
SMOOTH = "elu selu celu softplus logsigmoid softsign tanhshrink"
for _name in f"{SMOOTH} leaky_relu hardtanh relu6 hardswish hardshrink softshrink".split():
    case(_name, getattr(F, _name), lambda s: (s(3, s.n),))
case("hardsigmoid", F.hardsigmoid, lambda s: (s(3, s.n),), reference=lambda a: F.relu6(a + 3) / 6)
case("gelu", F.gelu, lambda s: (s(3, s.n),), F32, BF16)
case("gelu_tanh", lambda a: F.gelu(a, approximate="tanh"), lambda s: (s(3, s.n),))
case("threshold", lambda a: F.threshold(a, 0.2, 5.0), lambda s: (s(3, s.n),))
case("prelu", F.prelu, lambda s: (s(2, 3, s.n), s(3)))
case("glu", F.glu, lambda s: (s(3, 2 * s.n),))
case("add", lambda a, b: torch.add(a, b, alpha=2), lambda s: (s(3, s.n), s(s.n)), F32, BF16, C128)
case("sub", lambda a, b: a - b, lambda s: (s(3, 1), s(s.n)))
case("rsub", lambda a: 1 - a, lambda s: (s(s.n),))
case("mul", lambda a, b: a * b, lambda s: (s(3, s.n), s(3, 1)), F32, BF16, C128)
case("div", lambda a, b: a / b, lambda s: (s(3, s.n), s.pos(s.n)), F32)
case("div_complex", lambda a, b: a / b, lambda s: (s.complex(s.n), s.complex(s.n) + 3))
case(
    "floor_divide",
    lambda a, b: (a // b) * a,
    lambda s: (s(s.n), s.pos(s.n)),
    reference=lambda a, b: (a / b).floor() * a,
)
case(
    "div_trunc_scalar",
    lambda a: recorded(aten.div.Scalar_mode)(a, 0.7, rounding_mode="trunc") * a,
    lambda s: (s(3, s.n),),
    F32,
)
case(
    "div_no_mode_scalar",
    lambda a: recorded(aten.div.Scalar_mode)(a, 0.7, rounding_mode=None),
    lambda s: (s(3, s.n),),
)
case("div_no_mode", lambda a, b: torch.div(a, b, rounding_mode=None), lambda s: (s(3, s.n), s.pos(s.n)))
case(
    "copy",
    lambda a, b: aten.copy.default(a, b) * a,
    lambda s: (s(3, s.n), s(s.n)),
    reference=lambda a, b: b * a,
)
case(
    "copy_cast",
    lambda a, b: aten.copy.default(a.float(), b),
    lambda s: (s(s.n), s(s.n)),
    adjoint=False,
    precision=F32,
    reference=lambda a, b: b.float() + 0 * a.float(),
)
case("fill", lambda a: aten.fill.Scalar(a, 2.0) * a, lambda s: (s(3, s.n),), reference=lambda a: a * 2)
case(
    "fill_tensor",
    lambda a, v: aten.fill.Tensor(a, v) * a,
    lambda s: (s(3, s.n), s()),
    reference=lambda a, v: v * a,
)
case(
    "bitwise_scalars",
    lambda a: (
        a & 3,
        a | 4,
        a ^ 5,
        aten.bitwise_and.Scalar_Tensor(3, a),
        aten.bitwise_or.Scalar_Tensor(3, a),
        aten.bitwise_xor.Scalar_Tensor(3, a),
    ),
    lambda s: (s.ints(9, 3, s.n),),
)
case("remainder_scalar", lambda a: torch.remainder(a, 0.7), lambda s: (s(3, s.n),))
case("remainder", torch.remainder, lambda s: (s(s.n), s.pos(s.n)))
case("fmod", torch.fmod, lambda s: (s(s.n), s.pos(s.n)))
case("scalars", lambda a: (2 / (a + 3) - 1) * 0.5, lambda s: (s.pos(s.n),), F32, BF16)
case("pow_scalar", lambda a: a**3, lambda s: (s(s.n),))
case("pow_half", lambda a: a**0.5, lambda s: (s.pos(s.n),))
case("pow_negative", lambda a: a**-1.5, lambda s: (s.pos(s.n),))
case("pow", torch.pow, lambda s: (s.pos(2, s.n), s(s.n)))
case("pow_base", lambda a: 2.0**a, lambda s: (s(s.n),))
case("complex_pow", torch.pow, lambda s: (s.complex(2, s.n), s.complex(s.n)))
case("complex_pow_scalar", lambda a: (a**3, a ** (2 - 1j), a**0.5), lambda s: (s.complex(s.n),))
case("complex_pow_base", lambda b: (2.0**b, (-1.5) ** b, (2 - 1j) ** b, 0.0**b), lambda s: (s.complex(s.n),))
case("complex_float_power", torch.float_power, lambda s: (s.complex(s.n), s.complex(s.n)))
case("pow_of_zero", torch.pow, lambda s: (s(4) * 0, torch.tensor([1, 1.5, 2, 3], dtype=s.dtype)))
case(
    "complex_pow_of_zero",
    torch.pow,
    lambda s: (s.complex(5) * 0, torch.tensor([1, 1.5, 2, 3, 1 + 1j], dtype=C128)),
)
# Where one is real torch's forward mode takes the derivative's real part alone.
case("complex_pow_real", torch.pow, lambda s: (s.complex(s.n), s(s.n)), forward=False)
case("real_pow_complex", torch.pow, lambda s: (s(s.n), s.complex(s.n)), forward=False)
case("number_pow_complex", lambda a: (a ** (1 - 1j), (2 - 1j) ** a), lambda s: (s(s.n),), forward=False)
case("atan2", torch.atan2, lambda s: (s(s.n), s(s.n)))
case("hypot", torch.hypot, lambda s: (s(s.n), s(s.n)))
case("logaddexp", torch.logaddexp, lambda s: (s(s.n), s(2, s.n)))
case("entr", torch.special.entr, lambda s: (s.pos(s.n),))
case("xlogy", torch.xlogy, lambda s: (s(s.n), s.pos(s.n)))
case("addcmul", lambda a, b, c: torch.addcmul(a, b, c, value=0.5), lambda s: (s(s.n), s(2, s.n), s(s.n)))
case("addcdiv", lambda a, b, c: torch.addcdiv(a, b, c, value=0.5), lambda s: (s(s.n), s(2, s.n), s.pos(s.n)))
case("lerp", lambda a, b: torch.lerp(a, b, 0.3), lambda s: (s(s.n), s(s.n)))
case("lerp_tensor", torch.lerp, lambda s: (s(s.n), s(s.n), s(s.n)))
case("maximum", torch.maximum, lambda s: (s(2, s.n), s(s.n)))
case("minimum", torch.minimum, lambda s: (s(2, s.n), s(s.n)))
case("fmax", torch.fmax, lambda s: (s(s.n), s(s.n)))
case("fmin", torch.fmin, lambda s: (s(s.n), s(s.n)))
case("where", torch.where, lambda s: (s.bools(3, s.n), s(s.n), s(3, 1)))
case("where_scalar", lambda c, a: torch.where(c, a, 0.0), lambda s: (s.bools(3, s.n), s(s.n)))
case("clamp", lambda a: a.clamp(-0.5, 0.7), lambda s: (s(3, s.n),))
case("clamp_min", lambda a: a.clamp_min(0.1), lambda s: (s(s.n),))
case("clamp_max", lambda a: a.clamp_max(0.1), lambda s: (s(s.n),))
case("clamp_tensor", lambda a, lo, hi: a.clamp(lo, hi), lambda s: (s(3, s.n), s(s.n) - 1, s(s.n) + 1))
case("clamp_min_tensor", lambda a, lo: a.clamp_min(lo), lambda s: (s(3, s.n), s(s.n)))
case("clamp_max_tensor", lambda a, lo: a.clamp_max(lo), lambda s: (s(3, s.n), s(s.n)))
case("masked_fill", lambda a, m: a.masked_fill(m, 2.0), lambda s: (s(3, s.n), s.bools(s.n)))
case("masked_fill_tensor", lambda a, m, v: a.masked_fill(m, v), lambda s: (s(3, s.n), s.bools(s.n), s()))
case(
    "comparisons",
    lambda a, b: ((a < b) & (a >= 0) | (a == b)).to(a.dtype) * a * (a != 1) + (a > b) * (b <= 1),
    lambda s: (s(3, s.n), s(s.n)),
)
case(
    "logic",
    lambda a, b: (a.logical_and(b), a.logical_or(b), a.logical_xor(b), a.logical_not(), ~b, a ^ b),
    lambda s: (s.bools(4, s.n), s.bools(4, s.n)),
)
case(
    "tests",
    lambda a: tuple(t(a.masked_fill(a > 0.4, torch.inf).masked_fill(a < -0.4, torch.nan)) for t in TESTS),
    lambda s: (s(4, s.n),),
)
case("integer_tests", lambda a, b: (a == 1, a != b, a == b), lambda s: (s.ints(3, 4, s.n), s.ints(3, s.n)))
case(
    "heaviside",
    lambda a, b: torch.heaviside(a, b),
    lambda s: (s(s.n), s(s.n)),
    skip="jvp vjp vmap_vjp vmap_jvp jvp_vjp vjp_vjp no_grad",
)
case(
    "casts",
    lambda a: a.float().double() * a.to(torch.float64),
    lambda s: (s(s.n),),
    adjoint=False,
    precision=F32,
)
case(
    "promotion",
    lambda a, b: a * b.float() + b.to(torch.bfloat16),
    lambda s: (s(s.n), s(3, s.n)),
    adjoint=False,
    precision=BF16,
)
case(
    "promotion_0d",
    lambda a, b: a.to(torch.bfloat16) * b,
    lambda s: (s(s.n), s()),
    adjoint=False,
    precision=BF16,
)
case(
    "integers",
    lambda a, b: (a + b, a * b, a // (b + 1), a % (b + 1), a.float() / 3),
    lambda s: (s.ints(9, 3, s.n), s.ints(5, s.n)),
)
case("int_times_float", lambda a, b: a * b, lambda s: (s.ints(9, s.n), s(3, s.n)))

# ----- complex --------------------------------------------------------------------------------------------------------
case("complex_exp", lambda z: z.exp() * z.conj(), lambda s: (s.complex(s.n),))
case("complex_abs", torch.abs, lambda s: (s.complex(s.n),))
case("complex_angle", torch.angle, lambda s: (s.complex(s.n),))
case("complex_sgn", torch.sgn, lambda s: (s.complex(s.n),))
case("real_angle", torch.angle, lambda s: (s(s.n),))
case("real_imag", lambda z: z.real * z.imag, lambda s: (s.complex(s.n),))
case("qr_wide_complex", torch.linalg.qr, lambda s: (s.complex(2, s.n),))
case(
    "written_through_real",
    lambda z, x: _written(z, x),
    lambda s: (s.complex(s.n), s(s.n)),
    skip="vmap vmap_vjp vmap_jvp",
)
case("view_as_real", lambda z: torch.view_as_real(z), lambda s: (s.complex(s.n),))
case("view_as_complex", lambda x: torch.view_as_complex(x), lambda s: (s(s.n, 2),), skip="vmap")
case("complex_new", lambda a, b: torch.complex(a, b), lambda s: (s(s.n), s(s.n)))
case("complex_polar", lambda a, b: torch.polar(a, b), lambda s: (s.pos(s.n), s(s.n)))
case("complex_matmul", lambda a, b: a @ b.mH, lambda s: (s.complex(2, s.n), s.complex(3, s.n)))
case(
    "complex_unary",
    lambda z: z.sin() + z.tanh() + z.log() + z.sqrt() + z.reciprocal() + z.pow(3),
    lambda s: (s.complex(s.n),),
)
case("complex_real_mix", lambda z, x: z * x + x, lambda s: (s.complex(s.n), s(s.n)))
case("complex_norm", lambda z: torch.linalg.vector_norm(z), lambda s: (s.complex(s.n),))
case("complex_mean_var", lambda z: (z.mean(), z.var(), z.std()), lambda s: (s.complex(s.n),), forward=False)

# ----- reductions -----------------------------------------------------------------------------------------------------
case("sum", torch.sum, lambda s: (s(3, s.n),), F32, BF16, C128)
case("sum_dims", lambda a: a.sum((0, -1)), lambda s: (s(3, 2, s.n),))
case("sum_keepdim", lambda a: a.sum(1, keepdim=True), lambda s: (s(3, s.n),))
case("sum_dtype", lambda a: a.sum(1, dtype=torch.float64), lambda s: (s(3, s.n),), F32)
case("sum_bool", lambda a: (a > 0).sum() * a, lambda s: (s(3, s.n),))
case("mean", torch.mean, lambda s: (s(3, s.n),), F32, BF16)
case("mean_dim", lambda a: a.mean(-1, keepdim=True), lambda s: (s(3, s.n),))
case("var", lambda a: a.var(1), lambda s: (s(3, s.n),))
case("var_population", lambda a: a.var(correction=0), lambda s: (s(3, s.n),))
case("std", lambda a: a.std(0, keepdim=True), lambda s: (s(3, s.n),))
case("var_mean", lambda a: torch.var_mean(a, 1), lambda s: (s(3, s.n),))
case("std_mean", lambda a: torch.std_mean(a, 1), lambda s: (s(3, s.n),))
case("amax", lambda a: a.amax(1), lambda s: (s.distinct(3, s.n),))
case("amin", lambda a: a.amin((0, 1)), lambda s: (s.distinct(3, s.n) * s.pos(),))
case("var_dim", lambda a: recorded(aten.var.dim)(a, [1], False, True), lambda s: (s(3, s.n),))
case("var_all", lambda a: recorded(aten.var.default)(a, False), lambda s: (s(3, s.n),))
case("std_dim", lambda a: recorded(aten.std.dim)(a, [0]), lambda s: (s(3, s.n),))
case("std_all", lambda a: recorded(aten.std.default)(a), lambda s: (s(3, s.n),))
case("aminmax", lambda a: torch.aminmax(a, dim=1), lambda s: (s.distinct(3, s.n),), forward=False)
case("max", torch.max, lambda s: (s.distinct(3, s.n) * s.pos(),))
case("min", torch.min, lambda s: (s.distinct(3, s.n) * s.pos(),))
case("max_dim", lambda a: tuple(a.max(1)), lambda s: (s.distinct(3, s.n),))
case("min_dim", lambda a: tuple(a.min(0, keepdim=True)), lambda s: (s.distinct(3, s.n),))
case("median_dim", lambda a: tuple(a.median(1)), lambda s: (s.distinct(3, s.n),))
case("nanmedian_dim", lambda a: tuple(a.nanmedian(1)), lambda s: (s.distinct(3, s.n),))
case("mode", lambda a: a.mode(1)[0], lambda s: (s.distinct(3, s.n),))
case("kthvalue", lambda a: a.kthvalue(2, 1)[0], lambda s: (s.distinct(3, s.n),))
case(
    "argmax",
    lambda a: (a.argmax(), a.argmax(1), a.argmin(0), a.argmin(1, keepdim=True)),
    lambda s: (s.distinct(3, s.n),),
)
case(
    "any_all",
    lambda a: (a.any(), a.all(), a.any(1), a.all(0), a.any((0, 1)), a.all((0, 1))),
    lambda s: (s.bools(3, s.n),),
)
case(
    "any_few_all_many",
    lambda a, b: (a.any(), a.any(1), a.any((0, 1)), b.all(), b.all(1), b.all((0, 1))),
    lambda s: (s.ints(9, 2, s.n) > 6, s.ints(9, 2, s.n) < 8),
)
case("logsumexp", lambda a: a.logsumexp(1), lambda s: (s(3, s.n),))
case("softmax", lambda a: a.softmax(-1), lambda s: (s(3, s.n),), F32, BF16)
case(
    "safe_softmax",
    lambda a, m: torch.ops.aten._safe_softmax(a.where(m, -torch.inf), 1),
    lambda s: (s(3, s.n), s.ints(3, 3, 1) > 0),
)
case("softmax_0", lambda a: a.softmax(0), lambda s: (s(3, s.n),))
case("log_softmax", lambda a: a.log_softmax(1), lambda s: (s(3, s.n),), F32, BF16)
case("softmin", lambda a: F.softmin(a, 1), lambda s: (s(3, s.n),))
case("cumsum", lambda a: a.cumsum(1), lambda s: (s(3, s.n),))
case("cumprod", lambda a: a.cumprod(0), lambda s: (s(s.n, 3),))
case("logcumsumexp_shifted", lambda a: (a + 1e4).logcumsumexp(1), lambda s: (s(3, s.n),))
case("logcumsumexp", lambda a: a.logcumsumexp(1), lambda s: (s(3, s.n),))
case("cummax", lambda a: tuple(a.cummax(1)), lambda s: (s.distinct(3, s.n),))
case("cummin", lambda a: tuple(a.cummin(0)), lambda s: (s.distinct(3, s.n),))
case("prod", torch.prod, lambda s: (s(3, s.n),))
case("prod_dim", lambda a: a.prod(1), lambda s: (s(3, s.n),))
case("prod_keepdim", lambda a: a.prod(0, keepdim=True), lambda s: (s(3, s.n),))
case("norm", torch.norm, lambda s: (s(3, s.n),))
case("norm_dim", lambda a: a.norm(dim=1), lambda s: (s(3, s.n),))
case("norm_1", lambda a: torch.linalg.vector_norm(a, 1, dim=1), lambda s: (s(3, s.n),))
case("norm_3", lambda a: torch.linalg.vector_norm(a, 3), lambda s: (s(3, s.n),))
case("norm_inf", lambda a: torch.linalg.vector_norm(a, float("inf"), dim=0), lambda s: (s(3, s.n),))
case("normalize", lambda a: F.normalize(a, dim=-1), lambda s: (s(3, s.n),))
case("cosine_similarity", lambda a, b: F.cosine_similarity(a, b), lambda s: (s(3, s.n), s(3, s.n)))
case("dist", torch.dist, lambda s: (s(s.n), s(s.n)))
case("trace", torch.trace, lambda s: (s(s.n, s.n),))

# ----- matmul family --------------------------------------------------------------------------------------------------
case("mm", torch.mm, lambda s: (s(2, s.n), s(s.n, 3)), F32, BF16, C128)
case("bmm", torch.bmm, lambda s: (s(2, 3, s.n), s(2, s.n, 4)))
case("mv", torch.mv, lambda s: (s(2, s.n), s(s.n)))
case("dot", torch.dot, lambda s: (s(s.n), s(s.n)))
case("vdot", torch.vdot, lambda s: (s.complex(s.n), s.complex(s.n)))
case("outer", torch.outer, lambda s: (s(2), s(s.n)))
case("addmm", lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), lambda s: (s(3), s(2, s.n), s(s.n, 3)))
case("addmv", torch.addmv, lambda s: (s(2), s(2, s.n), s(s.n)))
case("addr", torch.addr, lambda s: (s(2, s.n), s(2), s(s.n)))
case("baddbmm", torch.baddbmm, lambda s: (s(2, 3, 4), s(2, 3, s.n), s(2, s.n, 4)))
case("addbmm", torch.addbmm, lambda s: (s(3, 4), s(2, 3, s.n), s(2, s.n, 4)))
case("matmul", torch.matmul, lambda s: (s(2, 1, 3, s.n), s(4, s.n, 2)))
case("matmul_vector", torch.matmul, lambda s: (s(s.n), s(2, s.n, 3)))
case("linear", F.linear, lambda s: (s(2, 3, s.n), s(4, s.n), s(4)))
case("linear_vector", F.linear, lambda s: (s(s.n), s(4, s.n)))
case("bilinear", F.bilinear, lambda s: (s(2, 3), s(2, s.n), s(4, 3, s.n), s(4)))
case("einsum", lambda a, b: torch.einsum("bij,jk->bik", a, b), lambda s: (s(2, 3, s.n), s(s.n, 2)))
case("einsum_diagonal", lambda a: torch.einsum("ii->i", a), lambda s: (s(s.n, s.n),))
case("tensordot", lambda a, b: torch.tensordot(a, b, dims=2), lambda s: (s(2, 3, s.n), s(3, s.n, 2)))
case("kron", torch.kron, lambda s: (s(2, 2), s(2, s.n)))
case("matrix_power", lambda a: torch.linalg.matrix_power(a, 3), lambda s: (s(s.n, s.n),))
case(
    "chain_matmul",
    lambda a, b, c: torch.linalg.multi_dot([a, b, c]),
    lambda s: (s(2, s.n), s(s.n, 3), s(3, 2)),
)
case("cross", lambda a, b: torch.linalg.cross(a, b), lambda s: (s(s.n, 3), s(s.n, 3)))

# ----- views, joins and splits ----------------------------------------------------------------------------------------
case("reshape", lambda a: a.reshape(-1, 2), lambda s: (s(s.n, 4),))
case("view", lambda a: a.contiguous().view(2, -1), lambda s: (s(s.n, 4),))
case("flatten", lambda a: a.flatten(1), lambda s: (s(2, s.n, 3),))
case("permute", lambda a: a.permute(2, 0, 1), lambda s: (s(2, s.n, 3),))
case("transpose", lambda a: a.transpose(0, -1), lambda s: (s(2, s.n, 3),))
case("t", lambda a: a.t() * 2, lambda s: (s(2, s.n),))
case("movedim", lambda a: a.movedim(0, 2), lambda s: (s(2, s.n, 3),))
case("squeeze", lambda a: a.squeeze() + a.squeeze(1), lambda s: (s(s.n, 1),), skip="vmap_vjp")
case("unsqueeze", lambda a: a.unsqueeze(-1) * a.unsqueeze(0), lambda s: (s(s.n),))
case("expand", lambda a: a.expand(2, s_n(a), -1), lambda s: (s(s.n, 1),))
case("expand_as", lambda a, b: a.expand_as(b), lambda s: (s(s.n), s(2, s.n)))
case("repeat", lambda a: a.repeat(2, 1, 3), lambda s: (s(2, s.n),))
case("repeat_interleave", lambda a: a.repeat_interleave(2, dim=0), lambda s: (s(2, s.n),))
case("tile", lambda a: a.tile(2), lambda s: (s(2, s.n),))
case("flip", lambda a: a.flip(0, -1), lambda s: (s(2, s.n),))
case("argmax_keepdim", lambda a: a * a.argmax(keepdim=True), lambda s: (s(3, s.n),))
case("flip_nothing", lambda a: a.flip(()), lambda s: (s(2, s.n),))
case("roll", lambda a: a.roll(1, 1), lambda s: (s(2, s.n),))
case("roll_flat", lambda a: a.roll(2), lambda s: (s(2, s.n),))
case("rot90", lambda a: a.rot90(), lambda s: (s(2, s.n),))
case("select", lambda a: a[-1] + a[:, 0].sum(), lambda s: (s(3, s.n),))
case("slice", lambda a: a[1:, ::2] * 2, lambda s: (s(3, s.n),))
case("slice_ends", lambda a: (a[:-1], a[-2:], a[5:]), lambda s: (s(s.n, 2),))
case("narrow", lambda a: a.narrow(1, 1, 2), lambda s: (s(2, s.n),))
case("diagonal", lambda a: a.diagonal(1, 0, -1), lambda s: (s(s.n, 2, s.n),))
case("diag", lambda a: torch.diag(a), lambda s: (s(s.n),))
case("diag_embed", lambda a: torch.diag_embed(a, 1), lambda s: (s(2, s.n),))
case("tril", lambda a: a.tril(-1), lambda s: (s(2, s.n, s.n),))
case("triu", lambda a: a.triu(1), lambda s: (s(s.n, 3),))
case("select_scatter", lambda a, b: a.select_scatter(b, 0, 1), lambda s: (s(3, s.n), s(s.n)))
case("slice_scatter", lambda a, b: a.slice_scatter(b, 1, 1, 3), lambda s: (s(2, s.n), s(2, 2)))
case("diagonal_scatter", lambda a, b: a.diagonal_scatter(b), lambda s: (s(s.n, s.n), s(s.n)))
case("cat", lambda a, b: torch.cat([a, b * 2, a], -1), lambda s: (s(2, s.n), s(2, 3)))
case("cat_types", lambda a, b: torch.cat([a, b], 0), lambda s: (s(2, s.n), s.ints(5, 1, s.n)))
case("stack", lambda a, b: torch.stack([a, b], 1), lambda s: (s(2, s.n), s(2, s.n)))
case("hstack", lambda a, b: torch.hstack([a, b]), lambda s: (s(s.n), s(2)))
case("split", lambda a: a.split(2, 1), lambda s: (s(2, s.n),))
case("split_sizes", lambda a: a.split([1, 2], 0), lambda s: (s(3, s.n),))
case("chunk", lambda a: a.chunk(2, 1)[0], lambda s: (s(2, s.n),))
case("unbind", lambda a: a.unbind(1)[1:], lambda s: (s(2, s.n),))
case("unfold", lambda a: a.unfold(1, 2, 1), lambda s: (s(2, s.n),))
case("pad", lambda a: F.pad(a, (1, 2, 0, 1), value=3.0), lambda s: (s(2, s.n),))
case("pad_negative", lambda a: F.pad(a, (-1, 2)), lambda s: (s(2, s.n),))
case("pad_reflect", lambda a: F.pad(a, (1, 2), mode="reflect"), lambda s: (s(2, s.n),))
case("pad_replicate", lambda a: F.pad(a, (1, 2), mode="replicate"), lambda s: (s(2, s.n),))
case("pad_circular", lambda a: F.pad(a, (1, 2), mode="circular"), lambda s: (s(1, 2, s.n),))
case("pad_reflect_planes", lambda a: F.pad(a, (1, 2, 0, 1), mode="reflect"), lambda s: (s(2, s.n, 3),), F32)
case(
    "pad_reflect_volumes",
    lambda a: F.pad(a, (1, 0, 0, 1, 2, 1), mode="reflect"),
    lambda s: (s(1, 2, 3, s.n, 2),),
)
case(
    "pad_replicate_planes", lambda a: F.pad(a, (1, 2, -1, 1), mode="replicate"), lambda s: (s(2, 2, s.n, 3),)
)
case(
    "pad_replicate_volumes",
    lambda a: F.pad(a, (1, 0, 0, 1, 2, 1), mode="replicate"),
    lambda s: (s(2, 2, s.n, 2),),
)
for _name in ("reflection", "replication"):
    for _rank, _pad in ((1, (1, 2)), (2, (1, 2, 0, 1)), (3, (1, 2, 0, 1, 1, 1))):
        _op = getattr(aten, f"{_name}_pad{_rank}d_backward")
        case(
            f"pad_{_name}_backward{_rank}d",
            lambda ct, op=_op, pad=_pad: op(ct, ct.new_zeros((2, *_unpadded(ct, pad))), pad),
            lambda s, rank=_rank: (s(2, *(5, 4, s.n + 3)[3 - rank :]),),
            skip="vmap",  # the zeros are made per example
        )
case("pixel_shuffle", lambda a: F.pixel_shuffle(a, 2), lambda s: (s(1, 4, s.n, 2),))
case("meshgrid", lambda a, b: torch.meshgrid(a, b, indexing="ij"), lambda s: (s(s.n), s(2)))
case("broadcast_tensors", lambda a, b: torch.broadcast_tensors(a, b), lambda s: (s(s.n), s(2, 1)))
case(
    "in_place",
    lambda a, b: _in_place(a, b),
    lambda s: (s(2, s.n), s(s.n)),
    reference=lambda a, b: _in_place_reference(a, b),
)
case(
    "factories",
    lambda a: (
        a * torch.eye(s_n(a), dtype=a.dtype)
        + torch.arange(s_n(a))
        + torch.ones_like(a) * torch.linspace(0, 1, s_n(a), dtype=a.dtype)
    ),
    lambda s: (s(s.n),),
)


# ----- convolution, pooling, interpolation ----------------------------------------------------------------------------
case("conv1d", F.conv1d, lambda s: (s(2, 3, s.n + 2), s(4, 3, 2), s(4)))
case("conv2d", F.conv2d, lambda s: (s(2, 3, s.n + 1, 4), s(4, 3, 2, 3), s(4)), F32)
case("conv2d_no_bias", lambda x, w: F.conv2d(x, w, padding=1), lambda s: (s(2, 3, s.n, 4), s(4, 3, 3, 3)))
case(
    "conv2d_options",
    lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=(1, 2), dilation=(1, 2), groups=2),
    lambda s: (s(2, 4, s.n + 3, 6), s(6, 2, 2, 3), s(6)),
)
case("conv2d_unbatched", F.conv2d, lambda s: (s(3, s.n, 4), s(2, 3, 2, 2), s(2)))
case("conv2d_same", lambda x, w: F.conv2d(x, w, padding="same"), lambda s: (s(1, 2, s.n, 4), s(2, 2, 3, 3)))
case("conv3d", F.conv3d, lambda s: (s(1, 2, 3, s.n, 3), s(2, 2, 2, 2, 2), s(2)))
case(
    "conv_transpose2d",
    lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1),
    lambda s: (s(2, 3, s.n, 3), s(3, 2, 3, 2), s(2)),
)
case(
    "conv_transpose2d_groups",
    lambda x, w, b: F.conv_transpose2d(x, w, b, groups=2, dilation=2),
    lambda s: (s(2, 4, s.n, 3), s(4, 3, 2, 2), s(6)),
)
case("max_pool1d", lambda a: F.max_pool1d(a, 2), lambda s: (s.distinct(2, 3, s.n + 2),))
case("max_pool2d", lambda a: F.max_pool2d(a, 2, stride=1, padding=1), lambda s: (s.distinct(2, 2, s.n, 4),))
case("max_pool2d_dilated", lambda a: F.max_pool2d(a, 2, dilation=2), lambda s: (s.distinct(2, s.n + 1, 5),))
case(
    "max_pool2d_indices",
    lambda a: F.max_pool2d(a, 2, return_indices=True),
    lambda s: (s.distinct(1, 2, s.n, 4),),
)
case("adaptive_max_pool2d", lambda a: F.adaptive_max_pool2d(a, 2), lambda s: (s.distinct(2, 2, s.n, 5),))
case("avg_pool1d", lambda a: F.avg_pool1d(a, 2, padding=1), lambda s: (s(2, 3, s.n + 1),))
case("avg_pool2d", lambda a: F.avg_pool2d(a, 2), lambda s: (s(2, 3, s.n, 4),))
case(
    "avg_pool2d_options",
    lambda a: F.avg_pool2d(a, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    lambda s: (s(2, s.n + 2, 6),),
)
case("avg_pool1d_options", lambda a: F.avg_pool1d(a, 3, 2, 1, True, False), lambda s: (s(3, s.n + 2),), F32)
case(
    "avg_pool1d_recorded",
    lambda a: recorded(aten.avg_pool1d.default)(a, [3], [2], [1], True, False),
    lambda s: (s(3, s.n + 2),),
)
case(
    "avg_pool1d_no_stride", lambda a: recorded(aten.avg_pool1d.default)(a, [2]), lambda s: (s(2, 3, s.n + 2),)
)
case(
    "adaptive_avg_pool1d",
    lambda a: recorded(aten.adaptive_avg_pool1d.default)(a, [2]),
    lambda s: (s(2, 3, s.n),),
)
case(
    "max_pool2d_backward",
    lambda ct, a, i: aten.max_pool2d_with_indices_backward(ct, a, [2, 2], [2, 1], [0, 0], [1, 1], False, i),
    lambda s: (s(2, 2, 3), s(2, 4, s.n + 1)[..., :4], s.ints(16, 2, 2, 3)),
    reference=lambda ct, a, i: _added_at(ct, a, i, 2),
)
case(
    "max_pool3d_backward",
    lambda ct, a, i: aten.max_pool3d_with_indices_backward(
        ct, a, [2, 2, 2], [1, 1, 1], [0, 0, 0], [1, 1, 1], False, i
    ),
    lambda s: (s(2, 1, 2, s.n - 1), s(2, 2, 3, s.n), s.ints(6 * s.n, 2, 1, 2, s.n - 1)),
    reference=lambda ct, a, i: _added_at(ct, a, i, 3),
)
case(
    "adaptive_max_pool2d_backward",
    aten.adaptive_max_pool2d_backward,
    lambda s: (s(2, 2, 2), s(2, 3, s.n), s.ints(3 * s.n, 2, 2, 2)),
    reference=lambda ct, a, i: _added_at(ct, a, i, 2),
)
case(
    "adaptive_max_pool3d_backward",
    aten.adaptive_max_pool3d_backward,
    lambda s: (s(1, 1, 2, 2), s(1, 2, 3, s.n), s.ints(6 * s.n, 1, 1, 2, 2)),
    reference=lambda ct, a, i: _added_at(ct, a, i, 3),
)
case("adaptive_avg_pool2d", lambda a: F.adaptive_avg_pool2d(a, (2, 1)), lambda s: (s(2, 3, s.n, 4),))
case("interpolate_nearest", lambda a: F.interpolate(a, scale_factor=2), lambda s: (s(2, 2, s.n, 3),))
case(
    "interpolate_bilinear",
    lambda a: F.interpolate(a, size=(5, 4), mode="bilinear", align_corners=True),
    lambda s: (s(2, 2, s.n, 3),),
)
case("interpolate_linear", lambda a: F.interpolate(a, size=5, mode="linear"), lambda s: (s(2, 2, s.n),))
case(
    "interpolate_bicubic",
    lambda a: F.interpolate(a, size=(5, 4), mode="bicubic"),
    lambda s: (s(1, 2, s.n, 3),),
)
for _mode, _rank in (("nearest", 2), ("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3)):
    case(
        f"interpolate_scale_{_mode}",
        lambda a, mode=_mode: F.interpolate(a, scale_factor=1.7, mode=mode),
        lambda s, rank=_rank: (s(1, 2, *(2, 3, s.n)[3 - rank :]),),
        F32,
    )
for _name, _rank in (
    *(
        (f"{_exact}{_rank}d", _rank)
        for _exact in ("upsample_nearest", "_upsample_nearest_exact")
        for _rank in (1, 2, 3)
    ),
    *(
        ("upsample_linear1d", 1),
        ("upsample_bilinear2d", 2),
        ("upsample_bicubic2d", 2),
        ("upsample_trilinear3d", 3),
    ),
    *(("_upsample_bilinear2d_aa", 2), ("_upsample_bicubic2d_aa", 2)),
):
    _op = getattr(aten, _name)
    case(
        f"interpolate_vec{_name}",
        lambda a, op=_op: tuple(
            recorded(op.vec)(a, size, *_corners(op), scales)
            for size, scales in ((None, [1.6] * (a.ndim - 2)), ([3] * (a.ndim - 2), None))
        ),
        lambda s, rank=_rank: (s(1, 2, *(2, 3, s.n)[3 - rank :]),),
    )
case("interpolate_exact", lambda a: F.interpolate(a, 5, mode="nearest-exact"), lambda s: (s(2, 2, s.n),))
case(
    "interpolate_exact2d",
    lambda a: F.interpolate(a, (5, 4), mode="nearest-exact"),
    lambda s: (s(1, 2, s.n, 3),),
)
case(
    "interpolate_exact3d",
    lambda a: F.interpolate(a, (4, 3, 5), mode="nearest-exact"),
    lambda s: (s(1, 2, s.n, 2, 3),),
)
for _mode in ("bilinear", "bicubic"):
    case(
        f"interpolate_{_mode}_antialias",
        lambda a, mode=_mode: F.interpolate(a, (2, 5), mode=mode, antialias=True),
        lambda s: (s(1, 2, s.n + 1, 3),),
    )
case("fold_unbatched", lambda a: F.fold(a, (3, 4), 2, padding=1, stride=2), lambda s: (s(4 * (s.n - 2), 6),))
case("unfold_strided", lambda a: F.unfold(a, 2, dilation=2, stride=(1, 2)), lambda s: (s(2, 2, s.n, 5),))
case("fold", lambda a: F.fold(a, (a.shape[-1] // 2 + 1, 2), (2, 1)), lambda s: (s(1, 4, 2 * (s.n - 1)),))
case("unfold_im2col", lambda a: F.unfold(a, (2, 2), padding=1), lambda s: (s(1, 2, s.n, 3),))

# ----- sampling at a grid ---------------------------------------------------------------------------------------------
for _mode in ("bilinear", "nearest", "bicubic"):
    for _padding in ("zeros", "border", "reflection"):
        for _align in (True, False):
            _options = {"mode": _mode, "padding_mode": _padding, "align_corners": _align}
            case(
                f"grid_sample_{_mode}_{_padding}_{_align}",
                lambda a, g, how=_options: F.grid_sample(a, g, **how),
                lambda s: (s(2, 2, s.n, 4), s(2, 3, 2, 2)),
                F32,
                reference=lambda a, g, how=_options: _grid_sampled(a, g, **how),
            )
            if _mode != "bicubic" and _padding != "border":
                case(
                    f"grid_sample_volume_{_mode}_{_padding}_{_align}",
                    lambda a, g, how=_options: F.grid_sample(a, g, **how),
                    lambda s: (s(1, 2, 2, s.n, 3), s(1, 2, 1, 2, 3)),
                    reference=lambda a, g, how=_options: _grid_sampled(a, g, **how),
                )

# ----- normalisation --------------------------------------------------------------------------------------------------
case(
    "layer_norm",
    lambda a, w, b: F.layer_norm(a, w.shape, w, b),
    lambda s: (s(2, 3, s.n), s(3, s.n), s(3, s.n)),
    F32,
)
case("layer_norm_plain", lambda a: F.layer_norm(a, a.shape[-1:]), lambda s: (s(2, s.n),))
case("group_norm", lambda a, w, b: F.group_norm(a, 2, w, b), lambda s: (s(2, 4, s.n), s(4), s(4)))
case(
    "instance_norm",
    lambda a, w, b: F.instance_norm(a, weight=w, bias=b),
    lambda s: (s(2, 3, s.n, 2), s(3), s(3)),
)
case(
    "batch_norm",
    lambda a, w, b: F.batch_norm(a, None, None, w, b, training=True),
    lambda s: (s(4, 3, s.n), s(3), s(3)),
    F32,
)
case("batch_norm_plain", lambda a: F.batch_norm(a, None, None, training=True), lambda s: (s(s.n + 1, 3),))
case(
    "batch_norm_eval",
    lambda a, m, v, w, b: F.batch_norm(a, (m / 2).to(a.dtype), (v + 1).to(a.dtype), w, b),
    lambda s: (s(3, 2, s.n, 2), s.ints(3, 2), s.ints(3, 2), s(2), s(2)),
)
case(
    "layer_norm_backward",
    lambda ct, a, w: _layer_norm_backward(ct, a, w),
    lambda s: (s(2, 3, s.n), s(2, 3, s.n), s(3, s.n)),
    F32,
    reference=lambda ct, a, w: _pulled(
        lambda a, w, b: _normed(a, tuple(range(-w.ndim, 0))) * w + b, ct, a, w, w
    ),
)
case(
    "layer_norm_backward_detached",
    lambda ct, a, w: _layer_norm_backward(ct, a, w, torch.Tensor.detach),
    lambda s: (s(2, s.n), s(2, s.n), s(s.n)),
    reference=lambda ct, a, w: _pulled(
        lambda a, w, b: _normed(a, tuple(range(-w.ndim, 0))) * w + b, ct, a, w, w
    ),
)
case(
    "layer_norm_backward_plain",
    lambda ct, a: _layer_norm_backward(ct, a, None)[0],
    lambda s: (s(s.n), s(s.n)),
    reference=lambda ct, a: _pulled(lambda a: _normed(a, (0,)), ct, a)[0],
)
case(
    "group_norm_backward",
    lambda ct, a, w: _group_norm_backward(ct, a, w),
    lambda s: (s(2, 4, s.n), s(2, 4, s.n), s(4)),
    F32,
    reference=lambda ct, a, w: _pulled(_grouped, ct, a, w, w),
)
case(
    "batch_norm_backward",
    lambda ct, a, w: _batch_norm_backward(ct, a, w, True),
    lambda s: (s(3, 2, s.n), s(3, 2, s.n), s(2)),
    F32,
    reference=lambda ct, a, w: _pulled(
        lambda a, w, b: _normed(a, (0, 2)) * w[:, None] + b[:, None], ct, a, w, w
    ),
)
case(
    "batch_norm_backward_eval",
    lambda ct, a, w, m: _batch_norm_backward(ct, a, w, False, m),
    lambda s: (s(3, 2, s.n), s(3, 2, s.n), s(2), s.ints(3, 2)),
    reference=lambda ct, a, w, m: _pulled(
        lambda a, w, b: _fixed(a, m[:, None].to(a.dtype)) * w[:, None] + b[:, None], ct, a, w, w
    ),
)
case(
    "dropout_backward",
    lambda ct, m: aten.native_dropout_backward(ct, m, 2.5),
    lambda s: (s(3, s.n), s.bools(3, s.n)),
    F32,
    reference=lambda ct, m: ct * m.to(ct.dtype) * 2.5,
)
case("rms_norm", lambda a, w: F.rms_norm(a, w.shape, w), lambda s: (s(2, 3, s.n), s(s.n)))
case("local_response_norm", lambda a: F.local_response_norm(a, 2), lambda s: (s(2, 3, s.n),))

# ----- distances ------------------------------------------------------------------------------------------------------
for _p in (0.5, 1.0, 1.5, 2.0, 3.0, torch.inf):
    case(
        f"cdist_{_p}",
        lambda a, b, p=_p: torch.cdist(a, b, p),
        lambda s: (s(s.n, 3), s(2, 3)),
        F32,
        reference=lambda a, b, p=_p: _length(a[:, None] - b, p),
    )
    case(
        f"pdist_{_p}",
        lambda a, p=_p: torch.pdist(a, p),
        lambda s: (s(s.n, 3),),
        F32,
        reference=lambda a, p=_p: _length(a[_pairs(a)[0]] - a[_pairs(a)[1]], p),
    )
    case(
        f"cdist_backward_{_p}",
        lambda ct, a, b, p=_p: aten._cdist_backward(ct, a, b, p, torch.cdist(a, b, p)),
        lambda s: (s(2, s.n), s(2, 3), s(s.n, 3)),
        reference=lambda ct, a, b, p=_p: _pulled(lambda a: _length(a[:, None] - b, p), ct, a)[0],
    )
case(
    "pdist_backward",
    lambda ct, a: aten._pdist_backward(ct, a, 3.0, torch.pdist(a, 3.0)),
    lambda s: (s(s.n * (s.n - 1) // 2), s(s.n, 2)),
    reference=lambda ct, a: _pulled(lambda a: _length(a[_pairs(a)[0]] - a[_pairs(a)[1]], 3.0), ct, a)[0],
)
case(
    "cdist_count",
    lambda a, b: (torch.cdist(a, b, 0.0), torch.pdist(a, 0.0)),
    lambda s: (s(s.n, 3).round(), s(2, 3).round()),
    reference=lambda a, b: (
        (a[:, None] != b).sum(-1) + 0 * a.sum(),
        (a[_pairs(a)[0]] != a[_pairs(a)[1]]).sum(-1) + 0 * a.sum(),
    ),
)
case(
    "cdist_batches",
    lambda a, b: torch.cdist(a, b),
    lambda s: (s(2, 1, s.n, 3), s(3, 2, 3)),
    reference=lambda a, b: _length(a[..., :, None, :] - b[..., None, :, :], 2.0),
)
for _p in (0.5, 1.0, 1.5, 2.0, 3.0, torch.inf):
    case(
        f"cdist_zero_distance_{_p}",
        lambda a, p=_p: (torch.cdist(a, a[:2], p), torch.pdist(torch.cat([a, a[:1]]), p)),
        lambda s: (s(s.n, 3).round(),),
        skip=FIRST_ONLY,
    )

# ----- Fourier transforms ---------------------------------------------------------------------------------------------
for _norm in ("backward", "ortho", "forward"):
    case(
        f"fft_{_norm}", lambda z, norm=_norm: torch.fft.fft(z, norm=norm), lambda s: (s.complex(2, s.n + 2),)
    )
    case(
        f"ifft_{_norm}",
        lambda z, norm=_norm: torch.fft.ifft2(z, norm=norm),
        lambda s: (s.complex(2, 3, s.n),),
    )
    case(f"rfft_{_norm}", lambda a, norm=_norm: torch.fft.rfft(a, norm=norm), lambda s: (s(2, s.n + 2),), F32)
    case(
        f"irfft_{_norm}",
        lambda z, norm=_norm: (
            torch.fft.irfft(z, norm=norm),
            torch.fft.irfft(z, 2 * z.shape[-1] - 1, norm=norm),
        ),
        lambda s: (s.complex(2, s.n),),
    )
case("fft_real", lambda a: torch.fft.fft(a), lambda s: (s(2, s.n + 2),), F32)
case("fft_0", lambda z: torch.fft.fft(z, dim=0), lambda s: (s.complex(s.n, 2),))
case("rfft_planes", lambda a: torch.fft.rfft2(a, dim=(1, 0)), lambda s: (s(s.n, 5, 2),))
case("rfft_one", lambda a: torch.fft.rfft(a, 1), lambda s: (s(2, s.n),))
case("rfft_two", lambda a: torch.fft.rfft(a, 2), lambda s: (s(2, s.n),))
case("irfft_one", lambda z: torch.fft.irfft(z, 1), lambda s: (s.complex(2, s.n),))
case("irfft_two", lambda z: torch.fft.irfft(z, 2), lambda s: (s.complex(2, s.n),))
case("irfft_planes", lambda z: torch.fft.irfft2(z, s=(3, 6)), lambda s: (s.complex(2, s.n, 4),))
case("hfft", lambda z: torch.fft.hfft(z), lambda s: (s.complex(2, s.n),))
case(
    "fft_convolution",
    lambda a, b: torch.fft.irfft(torch.fft.rfft(a, 8) * torch.fft.rfft(b, 8), 8),
    lambda s: (s(2, s.n), s(3)),
)
case("fft_squared", lambda a: torch.fft.rfftn(a).abs().square(), lambda s: (s(2, 3, s.n),))

# ----- losses ---------------------------------------------------------------------------------------------------------
for _reduction in ("none", "mean", "sum"):
    _how = {"reduction": _reduction}
    case(
        f"mse_{_reduction}", lambda a, b, how=_how: F.mse_loss(a, b, **how), lambda s: (s(3, s.n), s(3, s.n))
    )
    case(
        f"cross_entropy_{_reduction}",
        lambda a, t, how=_how: F.cross_entropy(a, t, **how),
        lambda s: (s(3, s.n), s.ints(s.n, 3)),
        F32,
    )
case("l1_loss", F.l1_loss, lambda s: (s(3, s.n), s(3, s.n)))
case("smooth_l1_loss", lambda a, b: F.smooth_l1_loss(a, b, beta=0.7), lambda s: (s(3, s.n), s(3, s.n)))
case(
    "huber_loss", lambda a, b: F.huber_loss(a, b, delta=0.7), lambda s: (s(3, s.n), s(3, s.n)), forward=False
)
case("bce", F.binary_cross_entropy, lambda s: (s.inside(0.1, 0.9, s.n), s.inside(0, 1, s.n)))
case(
    "bce_with_logits",
    lambda a, t, w: F.binary_cross_entropy_with_logits(a, t, pos_weight=w),
    lambda s: (s(3, s.n), s.inside(0, 1, 3, s.n), s.pos(s.n)),
)
case(
    "cross_entropy_weights",
    lambda a, t, w: F.cross_entropy(a, t, w.to(a.dtype), label_smoothing=0.1, ignore_index=1),
    lambda s: (s(4, s.n), torch.tensor([0, 1, 2, 0]), s.ints(3, s.n) + 1),
    reference=lambda a, t, w: _weighted_cross_entropy(a, t, w.to(a.dtype), 0.1, 1),
)
case("cross_entropy_2d", F.cross_entropy, lambda s: (s(2, 3, s.n, 2), s.ints(3, 2, s.n, 2)))
case("cross_entropy_soft", F.cross_entropy, lambda s: (s(3, s.n), s(3, s.n).softmax(1)))
case("cross_entropy_one", F.cross_entropy, lambda s: (s(s.n), s.ints(s.n)))
case("nll_loss", F.nll_loss, lambda s: (s(3, s.n), s.ints(s.n, 3)))
case(
    "kl_div",
    lambda a, b: F.kl_div(a, b, reduction="batchmean"),
    lambda s: (s(3, s.n), s.inside(0.1, 1, 3, s.n)),
)
case(
    "soft_margin_loss",
    lambda a, y: F.soft_margin_loss(a, y * 2 - 1),
    lambda s: (s(3, s.n), s.ints(2, 3, s.n)),
    reference=lambda a, y: (-(y * 2 - 1) * a).exp().log1p().mean(),
)

for _reduction in ("none", "mean", "sum"):
    _how = {"reduction": _reduction}
    case(
        f"multi_margin_{_reduction}",
        lambda a, t, how=_how: F.multi_margin_loss(a, t, p=2, margin=0.7, **how),
        lambda s: (s(3, s.n), s.ints(s.n, 3)),
        F32,
        reference=lambda a, t, how=_how: _reduced_as(_margins(a, t, 0.7).square().sum(1) / a.shape[1], **how),
    )
    case(
        f"multilabel_margin_{_reduction}",
        lambda a, t, how=_how: F.multilabel_margin_loss(a, t, **how),
        lambda s: (s(3, s.n), torch.tensor([[1, 0, -1, 2], [-1, 0, 1, 2], [2, 1, 0, -1]])[:, : s.n]),
        F32,
        reference=lambda a, t, how=_how: _reduced_as(_label_margins(a, t), **how),
    )
case(
    "multi_margin_weights",
    lambda a, t, w: F.multi_margin_loss(a, t, weight=w.to(a.dtype)),
    lambda s: (s(3, s.n), s.ints(s.n, 3), s.ints(5, s.n)),
    reference=lambda a, t, w: (_margins(a, t, 1.0).sum(1) * w.to(a.dtype)[t] / a.shape[1]).mean(),
)
case(
    "multi_margin_one",
    lambda a, t: F.multi_margin_loss(a, t.reshape(())),
    lambda s: (s(s.n), s.ints(s.n, 1)),
    reference=lambda a, t: _margins(a[None], t, 1.0).mean(),
)
case(
    "multi_margin_at_the_margin",
    lambda a, t: F.multi_margin_loss(a, t),
    lambda s: (s(3, s.n).round(), s.ints(s.n, 3)),
    skip=f"{FIRST_ONLY} vmap",
)
case(
    "multilabel_margin_one",
    lambda a, t: F.multilabel_margin_loss(a, t),
    lambda s: (s(s.n), torch.tensor([2, 0, -1, 1])[: s.n]),
    reference=lambda a, t: _label_margins(a[None], t[None])[0],
)
case(
    "multilabel_margin_at_the_margin",
    lambda a, t: F.multilabel_margin_loss(a, t),
    lambda s: (s(2, s.n).round(), torch.tensor([[2, 0, -1, 1], [1, -1, 0, 0]])[:, : s.n]),
    skip=f"{FIRST_ONLY} vmap",
)
case(
    "ctc_loss",
    lambda a, t: F.ctc_loss(a.log_softmax(2), t + 1, (4, 3), (2, 1), reduction="sum"),
    lambda s: (s(4, 2, s.n), s.ints(s.n - 1, 2, 2)),
    F32,
    skip="jvp vmap_jvp jvp_vjp vjp_vjp no_grad",
    adjoint=False,
)
case("poisson_nll", F.poisson_nll_loss, lambda s: (s(3, s.n), s.pos(3, s.n)))
case("hinge_embedding", F.hinge_embedding_loss, lambda s: (s(3, s.n), s(3, s.n).sign()))
case("triplet", F.triplet_margin_loss, lambda s: (s(3, s.n), s(3, s.n), s(3, s.n)))

# ----- indexing, embeddings, sorting ----------------------------------------------------------------------------------
case("gather", lambda a, i: a.gather(1, i), lambda s: (s(3, s.n), s.ints(s.n, 2, 5)))
case("scatter", lambda a, i, b: a.scatter(1, i, b), lambda s: (s(3, 5), s.perm(2, s.n), s(2, s.n)))
case("scatter_value", lambda a, i: a.scatter(1, i, 2.0), lambda s: (s(3, s.n), s.ints(s.n, 2, 2)))
case(
    "scatter_add", lambda a, i, b: a.scatter_add(0, i, b), lambda s: (s(3, s.n), s.ints(3, 4, s.n), s(4, s.n))
)
case("index", lambda a, i: a[i], lambda s: (s(s.n, 3), s.ints(s.n, 2, 2)))
case("index_two", lambda a, i, j: a[i, :, j], lambda s: (s(s.n, 2, 3), s.ints(s.n, 4), s.ints(3, 4)))
case("index_middle", lambda a, i, j: a[:, i, j], lambda s: (s(2, s.n, 3), s.ints(s.n, 2, 1), s.ints(3, 4)))
case("index_list", lambda a: a[[0, 2, 0]], lambda s: (s(s.n, 2),))
case("index_none", lambda a, i: a[:, None, i], lambda s: (s(2, s.n), s.ints(s.n, 4)))
case(
    "index_put",
    lambda a, i, b: _put(a, i, b),
    lambda s: (s(s.n + 1, 2), s.perm(s.n), s(s.n, 2)),
    reference=lambda a, i, b: a.index_put((i,), b),
)
case(
    "index_put_accumulate",
    lambda a, i, b: a.index_put((i,), b, True),
    lambda s: (s(s.n, 2), s.ints(s.n, 5), s(5, 2)),
)
case("index_select", lambda a, i: a.index_select(1, i), lambda s: (s(2, s.n), s.ints(s.n, 5)))
case(
    "index_add", lambda a, i, b: a.index_add(0, i, b, alpha=2), lambda s: (s(s.n, 2), s.ints(s.n, 4), s(4, 2))
)
case("index_copy", lambda a, i, b: a.index_copy(0, i, b), lambda s: (s(s.n, 2), s.perm(s.n)[:2], s(2, 2)))
case("index_fill", lambda a, i: a.index_fill(1, i, 2.0), lambda s: (s(2, s.n), s.ints(s.n, 2)))
case("take", lambda a, i: a.take(i), lambda s: (s(2, s.n), s.ints(2 * s.n, 3)))
case("take_along_dim", lambda a, i: a.take_along_dim(i, 1), lambda s: (s(2, s.n), s.ints(s.n, 2, 3)))
case(
    "masked_write",
    lambda a, m: _masked_write(a, m),
    lambda s: (s(3, s.n), s.bools(3, s.n)),
    reference=lambda a, m: (a * 2).masked_fill(m, 1.0),
)
case("embedding", lambda i, w: F.embedding(i, w), lambda s: (s.ints(s.n, 2, 3), s(s.n, 2)))
case(
    "embedding_padding",
    lambda i, w: F.embedding(i, w, padding_idx=1),
    lambda s: (s.ints(s.n, 2, 3), s(s.n, 2)),
    adjoint=False,  # torch keeps the padding row out of gradients, not out of tangents
)
case(
    "one_hot",
    lambda a, i: a @ F.one_hot(i, 4).to(a.dtype),
    lambda s: (s(2, s.n), s.ints(4, s.n)),
    reference=lambda a, i: a @ (i[..., None] == torch.arange(4)).to(a.dtype),
)
case("sort", lambda a: tuple(a.sort(1, descending=True)), lambda s: (s.distinct(3, s.n),))
case("sort_stable", lambda a: tuple(a.sort(dim=0, stable=True)), lambda s: (s.distinct(3, s.n),))
case("topk", lambda a: tuple(a.topk(2, 1)), lambda s: (s.distinct(3, s.n),))
case("argsort", lambda a: a.argsort(1), lambda s: (s.distinct(3, s.n),))
case(
    "searchsorted",
    lambda a, b: torch.searchsorted(a, b),
    lambda s: (s.distinct(s.n).sort()[0], s(2)),
    skip="vmap",
)

# ----- reductions by index --------------------------------------------------------------------------------------------
for _how in ("sum", "prod", "mean", "amax", "amin"):
    for _self in (True, False):
        case(
            f"scatter_reduce_{_how}_{_self}",
            lambda a, i, b, how=_how, keep=_self: a.scatter_reduce(1, i, b, how, include_self=keep),
            lambda s: (s.distinct(3, 4), s.ints(3, 2, s.n), s.distinct(3, s.n + 1) + 0.1),
            F32,
            reference=lambda a, i, b, how=_how, keep=_self: _scatter_reduced(a, i, b, how, keep),
        )
        if _how != "sum":
            case(
                f"index_reduce_{_how}_{_self}",
                lambda a, i, b, how=_how, keep=_self: a.index_reduce(0, i, b, how, include_self=keep),
                lambda s: (s.distinct(4, 3), s.ints(3, s.n), s.distinct(s.n, 3) + 0.1),
                reference=lambda a, i, b, how=_how, keep=_self: (
                    _scatter_reduced(a.mT, i.expand(3, -1), b.mT, how, keep).mT
                ),
            )
    case(
        f"scatter_reduce_ties_{_how}",
        lambda a, i, b, how=_how: a.scatter_reduce(0, i, b, how),
        lambda s: (s(3, 2).round(), s.ints(3, s.n + 2, 2), s(s.n + 2, 2).round()),
        skip="" if _how in ("sum", "mean") else FIRST_ONLY,
    )
case(
    "scatter_reduce_zeros",
    lambda a, i, b: a.scatter_reduce(0, i, b * (b > 0), "prod"),
    lambda s: (s(2), s.ints(2, s.n + 2), s(s.n + 2)),
    reference=lambda a, i, b: _scatter_reduced(a[None], i[None], (b * (b > 0))[None], "prod", True)[0],
)

# ----- bags of embeddings ---------------------------------------------------------------------------------------------
for _how in ("sum", "mean", "max"):
    for _pad in (None, 1):
        case(
            f"embedding_bag_{_how}_{_pad}",
            lambda i, w, how=_how, pad=_pad: F.embedding_bag(i, w, _offsets(i), mode=how, padding_idx=pad),
            lambda s: (s.ints(4, s.n + 3), s.distinct(4, 2)),
            F32,
            reference=lambda i, w, how=_how, pad=_pad: _bagged(i, w, how, pad),
        )
    case(
        f"embedding_bag_offsets_{_how}",
        lambda i, o, w, how=_how: F.embedding_bag(
            i, w, torch.cat([o[:1] * 0, o.sort()[0], o[:1] * 0 + len(i)]), mode=how, include_last_offset=True
        ),
        lambda s: (s.ints(4, s.n + 3), s.ints(6, 3), s.distinct(4, 2)),
        reference=lambda i, o, w, how=_how: _bagged(i, w, how, None, torch.cat([o[:1] * 0, o.sort()[0]])),
    )
case(
    "embedding_bag_planes",
    lambda i, w: F.embedding_bag(i, w),
    lambda s: (s.ints(4, 2, s.n), s(4, 3)),
    F32,
    reference=lambda i, w: w[i].mean(1),
)
for _pad in (None, 1):
    case(
        f"embedding_bag_weights_{_pad}",
        lambda i, w, v, pad=_pad: F.embedding_bag(
            i, w, _offsets(i), mode="sum", per_sample_weights=v, padding_idx=pad
        ),
        lambda s: (s.ints(4, s.n + 3), s(4, 2), s(s.n + 3)),
        F32,
        reference=lambda i, w, v, pad=_pad: _bagged(i, w, "sum", pad, weights=v),
    )
case(
    "embedding_bag_by_frequency",
    lambda i, w: F.embedding_bag(i, w, _offsets(i), scale_grad_by_freq=True),
    lambda s: (s.ints(4, s.n + 3), s(4, 2)),
    skip=f"{FIRST_ONLY} vmap",
    adjoint=False,  # torch scales gradients, not tangents
    # torch's own kernel divides by the counts of other indices
    reference=lambda i, w: _bagged(
        torch.arange(len(i)), F.embedding(i, w, scale_grad_by_freq=True), "mean", None, _offsets(i)
    ),
)
case(
    "embedding_bag_saved",
    lambda i, w: aten._embedding_bag(w, i, _offsets(i), False, 2)[1:],
    lambda s: (s.ints(4, s.n + 3), s.distinct(4, 2)),
    reference=lambda i, w: _bag_saved(i, w),
)

# ----- attention and recurrence ---------------------------------------------------------------------------------------
case(
    "attention",
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    lambda s: (s(1, 2, s.n, 4), s(1, 2, s.n, 4), s(1, 2, s.n, 4)),
    forward=False,
    reference=lambda q, k, v: _attention(q, k, v),
)


case(
    "multi_head_attention",
    lambda x, w, u: _multi_head(x, w, u, need_weights=False),
    lambda s: (s(s.n, 1, 4), s(12, 4), s(4, 4)),
    reference=lambda x, w, u: _multi_head(x, w, u, need_weights=True),
)
case(
    "fused_attention",
    lambda q, k, v, m: aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=m, scale=0.3
    ),
    lambda s: (s(1, 2, s.n, 4), s(1, 2, 3, 4), s(1, 2, 3, 4), s(1, 2, s.n, 3)),
    reference=lambda q, k, v, m: ((a := q @ k.mT * 0.3 + m).softmax(-1) @ v, a.logsumexp(-1)),
)
case(
    "view_as_complex_transposed",
    lambda x: torch.view_as_real(torch.view_as_complex(x.mT.contiguous()) ** 2).mT,
    lambda s: (s(2, s.n),),
)

# ----- rows that only some spellings reach ----------------------------------------------------------------------------
case("sub_scalar", lambda a: torch.ops.aten.sub.Scalar(a, 2.0), lambda s: (s(3, s.n),))
case("fmod_scalar", lambda a: torch.fmod(a, 0.7), lambda s: (s(3, s.n),))
case(
    "div_floor",
    lambda a, b: torch.div(a, b, rounding_mode="floor") * a,
    lambda s: (s(s.n), s.pos(s.n)),
    reference=lambda a, b: (a / b).floor() * a,
)
case(
    "index_fill_tensor",
    lambda a, i, v: a.index_fill(1, i, v),
    lambda s: (s(2, s.n), s.ints(s.n, 2), s()),
    skip="vmap vmap_vjp",
)
case(
    "masked_scatter",
    lambda a, m, b: a.masked_scatter(m, b),
    lambda s: (s(3, s.n), s.bools(3, s.n), s(3, s.n)),
    reference=lambda a, m, b: _masked_scatter(a, m, b),
)
case(
    "masked_scatter_wide_mask",
    lambda a, m, b: a.masked_scatter(m, b),
    lambda s: (s(s.n), s.bools(3, s.n), s(3, s.n)),
    reference=lambda a, m, b: _masked_scatter(a.expand(m.shape), m, b),
)
case(
    "masked_scatter_wide_both",
    lambda a, m, b: a.masked_scatter(m, b),
    lambda s: (s(2, 1, s.n), s.bools(3, 1), s(6, s.n)),
    reference=lambda a, m, b: _masked_scatter(*torch.broadcast_tensors(a, m), b),
)
case(
    "put",
    lambda a, i, b: a.put(i, b, accumulate=True),
    lambda s: (s(2, s.n), s.ints(2 * s.n, 3), s(3)),
    reference=lambda a, i, b: a.reshape(-1).index_put((i,), b, True).reshape(a.shape),
)
case("argsort_stable", lambda a: a.argsort(dim=1, stable=True), lambda s: (s.distinct(3, s.n),))
case(
    "bucketize",
    lambda a: torch.bucketize(a, torch.tensor([-1.0, 0.0, 1.0], dtype=a.dtype)),
    lambda s: (s(s.n),),
)
case(
    "searchsorted_own",
    lambda a, b: torch.searchsorted(a, b),
    lambda s: (s.distinct(2, s.n).sort(1)[0], s(2, 2)),
)
case(
    "norm_scalar",
    lambda a: torch.ops.aten.norm.Scalar(a, 3.0),
    lambda s: (s(3, s.n),),
    reference=lambda a: torch.linalg.vector_norm(a, 3.0),
)
case(
    "unsafe_index",
    lambda a, i: aten._unsafe_index.Tensor(a, [None, i]),
    lambda s: (s(2, s.n), s.ints(s.n, 3)),
    reference=lambda a, i: a[:, i],
)
case(
    "unsafe_index_put",
    lambda a, i, b: aten._unsafe_index_put.default(a, [i], b, True),
    lambda s: (s(s.n, 2), s.ints(s.n, 4), s(4, 2)),
    reference=lambda a, i, b: a.index_put((i,), b, True),
)
case("max_pool3d", lambda a: F.max_pool3d(a, 2), lambda s: (s.distinct(1, 2, s.n, 4, 3),))
case("adaptive_max_pool3d", lambda a: F.adaptive_max_pool3d(a, 2), lambda s: (s.distinct(1, 2, s.n, 4, 3),))
case("avg_pool3d", lambda a: F.avg_pool3d(a, 2), lambda s: (s(1, 2, s.n, 4, 3),))
case("adaptive_avg_pool3d", lambda a: F.adaptive_avg_pool3d(a, (2, 1, 2)), lambda s: (s(1, 2, s.n, 4, 3),))
case("interpolate_nearest1d", lambda a: F.interpolate(a, size=5), lambda s: (s(2, 2, s.n),))
case("interpolate_nearest3d", lambda a: F.interpolate(a, size=(4, 3, 5)), lambda s: (s(1, 2, s.n, 2, 3),))
case(
    "interpolate_trilinear",
    lambda a: F.interpolate(a, size=(4, 3, 5), mode="trilinear"),
    lambda s: (s(1, 2, s.n, 2, 3),),
)
case(
    "batch_norm_running",
    lambda a, w, b, m: F.batch_norm(a, m + 0.0, m * m, w, b, training=True),
    lambda s: (s(4, 3, s.n), s(3), s(3), s(3)),
    reference=lambda a, w, b, m: F.batch_norm(a, None, None, w, b, training=True) + 0 * m.sum(),
)

# ----- transposes that no derivative of the op reaches, but the backward of a user's Function may ----------------------
case(
    "transposed_masked_fill",
    lambda ct, m: transposed(lambda g: g.masked_fill(m, 0.0), ct, ct),
    lambda s: (s(3, s.n), s.bools(3, s.n)),
    reference=lambda ct, m: torch.where(m, 0.0, ct),
)
case(
    "transposed_masked_fill_tensor",
    lambda ct, m: transposed(lambda g, v: g.masked_fill(m, v), ct, ct, ct.sum()),
    lambda s: (s(3, s.n), s.bools(3, s.n)),
    reference=lambda ct, m: (torch.where(m, 0.0, ct), (ct * m).sum()),
)
case(
    "transposed_complex",
    lambda ct: transposed(torch.complex, ct, ct.real, ct.imag),
    lambda s: (s.complex(s.n),),
    reference=lambda ct: (ct.real, ct.imag),
)
case(
    "transposed_conv2d",
    lambda ct, w: transposed(lambda x, b: F.conv2d(x, w, b), ct, F.conv_transpose2d(ct, w), w[:, 0, 0, 0]),
    lambda s: (s(2, 4, s.n, 3), s(4, 3, 2, 2)),
    reference=lambda ct, w: (F.conv_transpose2d(ct, w), ct.sum((0, 2, 3))),
)


class _Backward(torch.autograd.Function):
    """A function whose gradient is a linear f of the cotangents, and whose tangent therefore is the transpose of f."""

    @staticmethod
    def forward(f, x, *like):
        return tuple(map(torch.zeros_like, like))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.f, ctx.rest = inputs[0], len(inputs) - 2

    @staticmethod
    def backward(ctx, *cts):
        return None, ctx.f(*cts), *[None] * ctx.rest


def transposed(f, ct, *like):
    """The transpose of a linear function f of tensors like these, at a cotangent of its result."""
    return fxfunc.jvp(lambda x: _Backward.apply(f, x, *like), (torch.zeros_like(ct),), (ct,))[1]


def _grid_sampled(a, grid, mode, padding_mode, align_corners):
    """One hat (or box, or cubic) function per element and axis, summed over the whole plane."""
    weights = []
    for d, size in enumerate(a.shape[2:]):
        g = grid[..., a.ndim - 3 - d].flatten(1)
        u = (g + 1) / 2 * (size - 1) if align_corners else ((g + 1) * size - 1) / 2
        ends = (0, size - 1) if align_corners else (-0.5, size - 0.5)
        pad = lambda x, ends=ends, size=size: _pad_place(x, *ends, size, padding_mode)
        weights.append(_weights_of(u, size, mode, pad))
    letters = "dhw"[-len(weights) :]
    out = torch.einsum(f"nc{letters}," + ",".join(f"nk{x}" for x in letters) + "->nck", a, *weights)
    return out.reshape(*a.shape[:2], *grid.shape[1:-1])


def _pad_place(u, low, high, size, padding_mode):
    if padding_mode == "reflection":
        u = low + (u - low).remainder(2 * (high - low))
        u = torch.where(u > high, 2 * high - u, u)
    return u if padding_mode == "zeros" else u.clamp(0, size - 1)


def _weights_of(u, size, mode, pad):
    """[N, K, size]: how much of each element is read."""
    elements = torch.arange(size, dtype=u.dtype)
    if mode == "bicubic":
        taps = u.floor()[..., None] + torch.arange(-1, 3)
        d, a = (u[..., None] - taps).abs(), -0.75
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return (torch.where(d <= 1, near, far)[..., None] * (pad(taps)[..., None] == elements)).sum(-2)
    d = (pad(u)[..., None] - elements).abs()
    return (d < 0.5).to(u.dtype) + 0 * d if mode == "nearest" else (1 - d).clamp_min(0)


def _offsets(i):
    """Four bags, the second and the last of them empty."""
    return torch.tensor([0, 2, 2, len(i)])


def _bagged(i, w, how, pad, offsets=None, weights=None):
    """Bags by their bounds: each a sum (or a maximum) over all indices, those of other bags and padding masked."""
    offsets = _offsets(i) if offsets is None else offsets
    ends = torch.cat([offsets[1:], offsets[:1] * 0 + len(i)])
    place = torch.arange(len(i))
    inside = (offsets[:, None] <= place) & (place < ends[:, None])
    inside = inside if pad is None else inside & (i != pad)
    rows = w[i] if weights is None else w[i] * weights[:, None]
    if how == "max":
        best = torch.where(inside[..., None], rows, -torch.inf)
        first = best.argmax(1, keepdim=True)
        return torch.where(inside.any(1)[:, None], rows.expand(best.shape).gather(1, first)[:, 0], 0.0)
    out = inside.to(w.dtype) @ rows
    return out if how == "sum" else out / inside.sum(1).clamp_min(1)[:, None]


def _bag_saved(i, w):
    """(bag of each index, size of each bag, index of each maximum)."""
    place = torch.arange(len(i))
    bag = torch.where(place < 2, 0, 2)
    rows = torch.where((bag == torch.arange(4)[:, None])[..., None], w[i], -torch.inf)
    best = i[rows.argmax(1)]
    sizes = torch.stack([(bag == b).sum() for b in range(4)])
    return bag, sizes, torch.where(sizes[:, None] > 0, best, 0)


def _scatter_reduced(a, i, b, how, keep):
    """Along the last axis, each place a list: in ops whose derivatives torch has to any order."""
    rows, columns = i.shape
    a, b, rest = a[:rows], b[:rows, :columns], a[rows:]
    here = i[:, None, :] == torch.arange(a.shape[1])[:, None]
    written = here.any(-1)
    unit = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "amax": -torch.inf, "amin": torch.inf}[how]
    old = a if keep else torch.where(written, torch.full_like(a, unit), a)
    every = torch.cat([old[..., None], torch.where(here, b[:, None, :], unit)], -1)
    if how == "mean":
        return torch.cat([every.sum(-1) / (here.sum(-1) + (1 if keep else ~written)), rest])
    return torch.cat([getattr(every, how)(-1), rest])


def _length(d, p):
    """The p-norm of differences without ties and zeros."""
    if p == torch.inf:
        return d.abs().amax(-1)
    return d.abs().pow(p).sum(-1).pow(1 / p)


def _pairs(a):
    return torch.triu_indices(a.shape[0], a.shape[0], 1)


def _pulled(f, ct, *xs):
    """The cotangents that torch pulls back."""
    return torch.func.vjp(f, *xs)[1](ct)


def _normed(a, dims):
    """By statistics over these dims, in ops whose derivatives torch has to any order."""
    centred = a - a.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + 0.1).rsqrt()


def _grouped(a, w, b):
    return _normed(a.reshape(a.shape[0], 2, -1), (2,)).reshape(a.shape) * w[:, None] + b[:, None]


def _fixed(a, mean):
    return (a - mean) * (mean * mean + 0.1).rsqrt()


def _layer_norm_backward(ct, a, w, saved=lambda x: x):
    """By statistics of its own, detached or not."""
    shape = a.shape if w is None else w.shape
    dims = tuple(range(-len(shape), 0))
    mean, var = a.mean(dims, True), a.var(dims, correction=0, keepdim=True)
    mask = [True, w is not None, w is not None]
    return aten.native_layer_norm_backward(ct, a, shape, saved(mean), saved((var + 0.1).rsqrt()), w, w, mask)


def _group_norm_backward(ct, a, w):
    rows = a.reshape(a.shape[0], 2, -1)
    mean, rstd = rows.mean(-1), (rows.var(-1, correction=0) + 0.1).rsqrt()
    return aten.native_group_norm_backward(ct, a, mean, rstd, w, *a.shape, 2, [True] * 3)


def _batch_norm_backward(ct, a, w, train, m=None):
    if train:
        mean, rstd = a.mean((0, 2)), (a.var((0, 2), correction=0) + 0.1).rsqrt()
        return aten.native_batch_norm_backward(ct, a, w, None, None, mean, rstd, True, 0.1, [True] * 3)
    m = m.to(a.dtype)
    return aten.native_batch_norm_backward(ct, a, w, m, m * m, None, None, False, 0.1, [True] * 3)


def _unpadded(ct, pad):
    """The sizes that padding made those of `ct`, outermost first."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    return [s - lo - hi for s, (lo, hi) in zip(ct.shape[-len(pairs) :], pairs, strict=True)]


def _corners(op):
    """align_corners, where an interpolation has it."""
    return [] if "nearest" in str(op) else [True]


def _added_at(ct, a, i, rank):
    """Each plane's cotangents added at flat places."""
    flat = lambda x: x.flatten(-rank)
    return flat(a * 0).scatter_add(-1, flat(i), flat(ct)).reshape(a.shape)


def s_n(a) -> int:
    """The size of a case, read off its first argument."""
    return a.shape[0]


def _in_place_reference(a, b):
    y = torch.cat([b[None], a[1:]])
    y = torch.stack([c * 3 if i == 1 else c for i, c in enumerate(y.unbind(1))], 1) + 1
    z = y.reshape(-1)
    z = torch.cat([z[:1], z[1:2].sin(), z[2:]])
    return z.reshape(y.shape), z


def _in_place(a, b):
    y = a * 1
    y[0] = b
    y[:, 1].mul_(3)
    y += 1
    z = y.view(-1)
    z[1:2].sin_()
    return y, z


def _put(a, i, b):
    y = a.clone()
    y[i] = b
    return y


def _masked_write(a, m):
    y = a * 2
    y[m] = 1.0
    return y


def _reduced_as(x, reduction):
    return x if reduction == "none" else getattr(x, reduction)()


def _margins(a, t, margin):
    """How far each class comes within the margin of the target's, which is left out."""
    others = torch.arange(a.shape[1]) != t[:, None]
    return torch.where(others, (a - a.gather(1, t[:, None]) + margin).relu(), 0.0)


def _label_margins(a, t):
    """As the definition has it: a sum over targets (up to the first -1) and all others."""
    given = (t >= 0).to(torch.int64).cumprod(1).bool()
    hit = ((t[:, :, None] == torch.arange(a.shape[1])) & given[:, :, None]).any(1)
    gaps = (1 - (a.gather(1, t.clamp_min(0))[:, :, None] - a[:, None])).relu()
    return torch.where(given[:, :, None] & ~hit[:, None], gaps, 0.0).sum((1, 2)) / a.shape[1]


def _weighted_cross_entropy(a, t, w, smoothing, ignored):
    log = a.log_softmax(1)
    kept = (t != ignored).to(a.dtype)
    hit = -(log.gather(1, t[:, None])[:, 0] * w[t] * kept).sum()
    spread = -((log * w).sum(1) * kept).sum()
    return ((1 - smoothing) * hit + smoothing / a.shape[1] * spread) / (w[t] * kept).sum()


def _attention(q, k, v):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).tril().logical_not(), -torch.inf).softmax(-1) @ v


def _written(z, x):
    z = z.clone()
    z.real.mul_(x)
    torch.view_as_real(z).add_(x[:, None])
    return z * z


def _two_layers(x, w):
    return (x @ w).sin() @ w


def _masked_scatter(a, m, b):
    rank = m.reshape(-1).to(torch.int64).cumsum(0) - 1
    return torch.where(m, b.reshape(-1)[rank.clamp_min(0)].reshape(a.shape), a)


def _multi_head(x, w, u, **how):
    return F.multi_head_attention_forward(x, x, x, 4, 2, w, None, None, None, False, 0.0, u, None, **how)[0]


case(
    "linspace_of_tensors",
    lambda a, b: (
        torch.linspace(a, b, 4, dtype=a.dtype),
        torch.linspace(a, 2.0, 4, dtype=a.dtype),
        torch.linspace(2.0, b, 4, dtype=a.dtype),
    ),
    lambda s: (s(), s()),
    reference=lambda a, b: tuple(x + (y - x) * torch.arange(4) / 3 for x, y in ((a, b), (a, 2.0), (2.0, b))),
)
case(
    "checkpoint",
    fxfunc.checkpoint(_two_layers, policy="nothing"),
    lambda s: (s(2, s.n), s(s.n, s.n)),
    reference=_two_layers,
)
