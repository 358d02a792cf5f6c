"`balms.methods`, `balms.recipe`, `balms.rows`, `balms.runs` and `balms.tables` in one import."
from .methods import *
from .recipe import *
from .rows import *
from .checkpoint import *
from .stage import *
from .learner import *
from .runs import *
from .tables import *
