"""Answers as flat lists of numpy arrays, and how wrong one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def leaves(tree: Any) -> list[np.ndarray]:
    """The arrays in dicts (by sorted key, as JAX has them), lists and tuples."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [leaf for each in tree for leaf in leaves(each)]
    return [] if tree is None else [np.asarray(tree)]


def error(found: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """max|d| / max(|ref|max, 1), the worst over the leaves. Raises ValueError for other shapes or other places of NaN and inf."""
    if [a.shape for a in found] != [r.shape for r in reference]:
        raise ValueError(f"answer of shapes {_shapes(found)}, expected {_shapes(reference)}")
    return max((_leaf_error(a, r) for a, r in zip(found, reference, strict=True)), default=0.0)


def _leaf_error(a: np.ndarray, r: np.ndarray) -> float:
    if not np.array_equal(np.isfinite(a), np.isfinite(r)):
        raise ValueError("NaN or inf where the reference has none, or none where it has")
    a, r = (np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0) for x in (a, r))
    return float(np.abs(a - r).max(initial=0) / max(np.abs(r).max(initial=0), 1))


def _shapes(arrays: list[np.ndarray]) -> str:
    return ", ".join(str(list(a.shape)) for a in arrays)


def save(arrays: list[np.ndarray], folder: Path) -> None:
    """One file a leaf."""
    folder.mkdir()
    for i, array in enumerate(arrays):
        np.save(folder / f"{i:04}.npy", array)


def load(folder: Path) -> list[np.ndarray]:
    """What `save` wrote, read from disk as it is used."""
    return [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]
