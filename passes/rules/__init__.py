"""The rule rows, by family. Importing this package fills the table."""

from . import matmul, pointwise, reduce, region, shape
from .table import ROWS, Row, Undefined

__all__ = ["ROWS", "Row", "Undefined", "matmul", "pointwise", "reduce", "region", "shape"]
