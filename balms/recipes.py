"`balms.methods`, `balms.recipe`, `balms.rows`, `balms.runs` and `balms.tables` in one import."
from .methods import *
from .recipe import *
from .rows import *
from .checkpoint import *
from .stage import *
from .learner import *
from .runs import *
from .tables import *
from .old_rows import _append, _usable, read_ledger  # noqa: F401 (temporary)
_found = _writable = _after = _under = seed_ranks = None  # temporary
