"""Temporary: the old place of what is now in `lists`, `list_loader` and `packs`; to be deleted."""
import numpy as np, torch
from .datasets import read_image
from .lists import *
from .list_loader import *
from .list_loader import list_dls as _list_dls
from .packs import *


def decode_rgb(data, orient=True):
    data = data if isinstance(data, bytes) else bytes(data)
    return torch.from_numpy(np.array(read_image(data, orient))).permute(2, 0, 1)


def list_dls(*args, decode='workers', **kwargs): return _list_dls(*args, **kwargs)


PackedDataset._crc = property(lambda self: self.crcs())
PackedDataset.idxs = property(lambda self: np.arange(len(self)))
