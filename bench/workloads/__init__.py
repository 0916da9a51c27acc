"""The bench's own workloads. Importing this package registers them, in the order of the tables."""

# isort: off
from . import maml as maml
from . import psg as psg
from . import ensemble as ensemble
from . import jacobians as jacobians
