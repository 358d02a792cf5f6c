"`balms.long_tail`, `balms.datasets` and `balms.array_loader` in one import."
from .long_tail import *
from .datasets import *
from .array_loader import *
from .files import write_file  # noqa: F401 (temporary)
from .old_images import _MOST, _check_pixels, _check_regular, _opened, _read_file, _rgb, _turned, _uncompressed  # noqa: F401, E501 (temporary)
