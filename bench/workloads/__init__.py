"""The bench's own workloads. Importing this package registers them, in the order of the tables."""

# isort: off
from . import maml as maml
from . import few_shot as few_shot
from . import psg as psg
from . import ensemble as ensemble
from . import jacobians as jacobians
from . import omniglot as omniglot
from . import lennard_jones as lennard_jones
from . import dpsgd as dpsgd
from . import laplacian as laplacian
