"""Make `balms/cifar_order.npz`: `python tools/cifar_order.py ROOT`

ROOT holds the subsets of CIFAR-10 and CIFAR-100 at imbalance 10 that the ledger was measured on, as
`cifar10/train/<class>/*` and `cifar100/train/<class>/*`. The file has, class by class, the checksum of each image,
in the order in which `split_seed` 0 keeps them."""
from pathlib import Path

import numpy as np
from fastcore.script import call_parse

from balms.core import class_counts
from balms.datasets import CIFAR, image_crcs, load_folder
from balms.long_tail import long_tail_counts

def kept_order(ds):
    "The checksums of all images, class by class as `long_tail_indices` shuffles them with seed 0"
    crcs = []
    for label in range(ds.c):
        images = ds.images[ds.targets == label]
        shuffled = np.random.default_rng([0, label]).permutation(len(images))
        crcs.append(image_crcs(images)[shuffled])
    return np.concatenate(crcs)

@call_parse
def main(
    root:str, # Folder of cifar10/ and cifar100/
):
    "Make balms/cifar_order.npz from the subsets at imbalance 10"
    orders = {}
    for name, profile in CIFAR.items():
        train, _ = load_folder(Path(root)/name)
        if class_counts(train).tolist() != long_tail_counts(*profile, 10):
            raise ValueError(f'{root}/{name} is not the subset at imbalance 10')
        orders[name] = kept_order(train)
    np.savez(Path(__file__).parent.parent/'balms/cifar_order.npz', **orders)
