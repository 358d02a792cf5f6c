"`balms.long_tail`, `balms.datasets` and `balms.array_loader` in one import."
from .long_tail import *
from .datasets import *
from .array_loader import *
from .files import write_file  # noqa: F401 (temporary)
