"""Symbolic sizes. Entry point: `Dim`, an integer polynomial in named sizes; graphs hold it wherever an int may stand.

Decisions that depend on a Dim (`==`, `<` inside captured code) are taken only if they hold for every size >= 2;
sizes 0 and 1 then run the same program. A question that cannot be decided raises `DynamicShape`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import errors

STAND_IN = 1024

Monomial = tuple  # sorted tuple of atoms: a name, or ("//", Dim, int), or ("%", Dim, int)


class Dim:
    """An integer expression over named sizes; `Dim("T")` names a new one. Immutable, hashable, ordered by terms."""

    __slots__ = ("terms", "_hash")

    def __new__(cls, name: str):
        if not name.isidentifier():
            raise ValueError(f"a Dim is named by an identifier, not {name!r}")
        return cls._make({(name,): 1})

    @classmethod
    def _make(cls, terms: dict[Monomial, int]) -> Dim | int:
        terms = {m: c for m, c in terms.items() if c}
        if not terms:
            return 0
        if len(terms) == 1 and () in terms:
            return terms[()]
        self = object.__new__(cls)
        self.terms = tuple(sorted(terms.items(), key=repr))
        self._hash = hash(self.terms)
        return self

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        return isinstance(other, Dim) and self.terms == other.terms

    def __add__(self, other) -> Dim | int:
        out = dict(self.terms)
        for m, c in terms_of(other):
            out[m] = out.get(m, 0) + c
        return Dim._make(out)

    def __mul__(self, other) -> Dim | int:
        out: dict[Monomial, int] = {}
        for m, c in self.terms:
            for n, d in terms_of(other):
                key = tuple(sorted(m + n, key=repr))
                out[key] = out.get(key, 0) + c * d
        return Dim._make(out)

    def __neg__(self) -> Dim | int:
        return self * -1

    def __sub__(self, other) -> Dim | int:
        return self + other * -1

    def __rsub__(self, other) -> Dim | int:
        return self * -1 + other

    def __floordiv__(self, d: int) -> Dim | int:
        quotient, rest = {}, {}
        for m, c in self.terms:
            q, r = divmod(c, d)
            quotient[m], rest[m] = q, r
        rest = Dim._make(rest)
        if isinstance(rest, Dim):
            quotient[(("//", rest, d),)] = 1
        return Dim._make(quotient)

    def __mod__(self, d: int) -> Dim | int:
        rest = Dim._make({m: c % d for m, c in self.terms})
        return Dim._make({(("%", rest, d),): 1}) if isinstance(rest, Dim) else rest % d

    __radd__, __rmul__ = __add__, __mul__

    def names(self) -> set[str]:
        """The sizes this expression depends on."""
        out = set()
        for m, _ in self.terms:
            for atom in m:
                out |= {atom} if isinstance(atom, str) else atom[1].names()
        return out

    def at(self, sizes: dict[str, int]) -> int:
        """The value for given sizes."""
        return sum(c * _product(_atom_at(a, sizes) for a in m) for m, c in self.terms)

    def python(self, rename: Callable[[str], str] = str) -> str:
        """The expression as Python source over its names, or what they are renamed to."""
        return (
            "("
            + " + ".join(
                "*".join([str(c)] * (c != 1 or not m) + [_atom_python(a, rename) for a in m])
                for m, c in self.terms
            )
            + ")"
        )

    def __str__(self) -> str:
        text = self.python()[1:-1]
        return text if len(self.terms) == 1 else f"({text})"

    __repr__ = __str__


Size = int | Dim


def terms_of(x: Size):
    """The (monomial, coefficient) pairs of a size."""
    return x.terms if isinstance(x, Dim) else (((), x),)


def _product(xs):
    out = 1
    for x in xs:
        out = out * x
    return out


def _atom_at(atom, sizes):
    if isinstance(atom, str):
        return sizes[atom]
    op, inner, d = atom
    return inner.at(sizes) // d if op == "//" else inner.at(sizes) % d


def _atom_python(atom, rename: Callable[[str], str]) -> str:
    return rename(atom) if isinstance(atom, str) else f"({atom[1].python(rename)} {atom[0]} {atom[2]})"


def numel(shape) -> Size:
    """The number of elements of a shape."""
    return _product(shape)


def at(x, sizes: dict[str, int]):
    """`x` with a Dim replaced by its value."""
    return x.at(sizes) if isinstance(x, Dim) else x


def estimate(x: Size) -> int:
    """A size for choices that depend on sizes: symbolic ones are taken for `STAND_IN`."""
    return x.at(dict.fromkeys(x.names(), STAND_IN)) if isinstance(x, Dim) else x


def sign(x: Size) -> int | None:
    """-1, 0 or 1 if `x` has that sign for all sizes >= 2, else None."""
    if not isinstance(x, Dim):
        return (x > 0) - (x < 0)
    if any(not isinstance(a, str) for m, _ in x.terms for a in m):
        return None
    shifted = _shift(x)
    coefficients = [c for _, c in terms_of(shifted)]
    constant = dict(terms_of(shifted)).get((), 0)
    if abs(constant) > 2**62:  # no size comes near: C++ writes the largest integer for "to the end"
        return 1 if constant > 0 else -1
    if all(c >= 0 for c in coefficients) and constant > 0:
        return 1
    if all(c <= 0 for c in coefficients) and constant < 0:
        return -1
    return None


def _shift(x: Dim) -> Size:
    """`x` with every size n replaced by n + 2."""
    return sum((c * _product(Dim._make({(a,): 1, (): 2}) for a in m) for m, c in x.terms), 0)


class _Node:
    """The SymNode interface of torch over a Dim, so that captured code can compute with `tensor.shape`."""

    def __init__(self, value):
        self.value = value

    is_int = lambda self: not isinstance(self.value, bool)
    is_bool = lambda self: isinstance(self.value, bool)
    is_float = is_nested_int = lambda self: False
    is_symbolic = has_hint = lambda self: True
    is_constant = lambda self: False
    maybe_as_int = constant_int = nested_int = lambda self: None
    clone = lambda self: self
    wrap_int = wrap_bool = lambda self, value: _Node(value)

    add = lambda self, other: _Node(self.value + other.value)
    sub = lambda self, other: _Node(self.value - other.value)
    mul = lambda self, other: _Node(self.value * other.value)
    neg = lambda self: _Node(-self.value)
    mod = lambda self, other: _Node(self.value % _static(other, "%"))
    floordiv = int_floordiv = lambda self, other: _Node(self.value // _static(other, "//"))
    truediv = int_truediv = sym_float = float_pow = lambda self, *other: _undecided("as a float")

    eq = lambda self, other: _Node(_compare(self, other, "==") == 0)
    ne = lambda self, other: _Node(_compare(self, other, "!=") != 0)
    lt = lambda self, other: _Node(_compare(self, other, "<") < 0)
    le = lambda self, other: _Node(_compare(self, other, "<=") <= 0)
    gt = lambda self, other: _Node(_compare(self, other, ">") > 0)
    ge = lambda self, other: _Node(_compare(self, other, ">=") >= 0)
    sym_max = lambda self, other: self if _compare(self, other, "max") >= 0 else other
    sym_min = lambda self, other: self if _compare(self, other, "min") <= 0 else other
    and_ = sym_and = lambda self, other: _Node(self.value and other.value)
    or_ = sym_or = lambda self, other: _Node(self.value or other.value)
    sym_not = lambda self: _Node(not self.value)
    sym_ite = lambda self, a, b: a if self.value else b

    guard_int = int_ = lambda self, *where: _undecided(f"the int of {self.value}")
    guard_bool = guard_size_oblivious = expect_true = guard_or_false = guard_or_true = lambda self, *where: (
        self.value
    )
    statically_known_true = bool_ = lambda self, *where: self.value
    expect_size = lambda self, *where: True
    # Tracers are logically dense: layouts are the backend's business.
    is_contiguous = is_non_overlapping_and_dense = lambda self, sizes, strides: _Node(True)
    is_channels_last_contiguous_2d = is_channels_last_contiguous_3d = lambda self, sizes, strides: _Node(
        False
    )
    is_channels_last_strides_2d = is_channels_last_strides_3d = lambda self, sizes, strides: _Node(False)

    def __str__(self) -> str:
        return str(self.value)

    str = _graph_repr = __str__


def _static(node, op: str) -> int:
    return node.value if isinstance(node.value, int) else _undecided(f"a size {op} {node.value}")


def _compare(a, b, op: str) -> int:
    found = sign(a.value - b.value)
    return _undecided(f"{a.value} {op} {b.value}") if found is None else found


def _undecided(what: str):
    raise errors.DynamicShape(what=what)


def to_torch(x: Size):
    """A Dim as the SymInt that captured code sees."""
    return torch.SymInt(_Node(x)) if isinstance(x, Dim) else x


def from_torch(x):
    """A SymInt met in captured code as its Dim."""
    return x.node.value if isinstance(x, torch.SymInt) else x
