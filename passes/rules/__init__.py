"""The rule rows, by family. Importing this package fills the table."""

from . import (
    conv,
    distance,
    fourier,
    indexing,
    loop,
    loss,
    matmul,
    norm,
    pointwise,
    random,
    reduce,
    region,
    resample,
    sampling,
    segments,
    shape,
)
from .table import ROWS, Row, Undefined

__all__ = [
    "ROWS",
    "Row",
    "Undefined",
    "conv",
    "distance",
    "fourier",
    "indexing",
    "loop",
    "loss",
    "matmul",
    "norm",
    "pointwise",
    "random",
    "reduce",
    "region",
    "resample",
    "sampling",
    "segments",
    "shape",
]
