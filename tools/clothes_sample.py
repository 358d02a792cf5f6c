"""Make `balms/clothes.zip`, the sample of clothes that comes with the package, or a folder of all of them.

    python tools/clothes_sample.py CLOTHING balms/clothes.zip          # a quarter of the training photos, WebP
    python tools/clothes_sample.py CLOTHING clothes --share 1          # all of them, as they are

CLOTHING has `images.csv` (image, label, kids), `images/<image>.jpg` and `LICENSE`: the clothing data set by A. Grigorev
and contributors, https://github.com/alexeygrigorev/clothing-dataset, CC0 1.0, here with a short side of 128 pixels.
Three of its labels, which say that a photo is of no class, are left out. Names of photos are random, so their order is:
of each class the first 10 are for testing, and the first `share` of the others for training.
"""
import argparse
import csv
import io
import zipfile
from collections import defaultdict
from pathlib import Path
from PIL import Image

NO_CLASS, TEST, QUALITY = ('Not sure', 'Other', 'Skip'), 10, 40
ABOUT = """# Clothes

{train:,} photos to train on, {largest} of the largest of {classes} classes and {smallest} of the smallest, and
{test} of each class to test on.

Source: the clothing data set by Alexey Grigorev and contributors, https://github.com/alexeygrigorev/clothing-dataset
Licence: CC0 1.0, https://creativecommons.org/publicdomain/zero/1.0/
Changed: short side 128 pixels; labels that mean no class left out; split as `tools/clothes_sample.py` says.
"""


def split(source, share):
    "{'train': {class: names}, 'test': ...}"
    by_class = defaultdict(list)
    with open(source/'images.csv', newline='', encoding='utf-8') as f:
        for row in csv.DictReader(f):
            if row['label'] not in NO_CLASS: by_class[row['label']].append(row['image'])
    train, test = {}, {}
    for label, names in sorted(by_class.items()):
        test[label], rest = sorted(names)[:TEST], sorted(names)[TEST:]
        train[label] = rest[:int(len(rest)*share)]
    return dict(train=train, test=test)


def webp(path):
    data = io.BytesIO()
    with Image.open(path) as image: image.convert('RGB').save(data, 'webp', quality=QUALITY, method=6)
    return data.getvalue()


def files(source, share):
    "(path, bytes) of each file of the sample"
    splits, as_is = split(source, share), share == 1
    sizes = [len(names) for names in splits['train'].values()]
    about = ABOUT.format(train=sum(sizes), largest=max(sizes), smallest=min(sizes), classes=len(sizes), test=TEST)
    yield 'README.md', about.encode()
    yield 'LICENSE', (source/'LICENSE').read_bytes()
    for name, classes in splits.items():
        for label, images in classes.items():
            for image in images:
                photo = source/f'images/{image}.jpg'
                data = photo.read_bytes() if as_is else webp(photo)
                yield f'{name}/{label}/{image[:8]}.{"jpg" if as_is else "webp"}', data


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--share', type=float, default=.25)
    args = parser.parse_args()
    if args.out.suffix == '.zip':
        with zipfile.ZipFile(args.out, 'w') as archive:
            for name, data in files(args.source, args.share):
                method = zipfile.ZIP_STORED if name.endswith('.webp') else zipfile.ZIP_DEFLATED
                archive.writestr(zipfile.ZipInfo(name), data, method)
    else:
        for name, data in files(args.source, args.share):
            (args.out/name).parent.mkdir(parents=True, exist_ok=True)
            (args.out/name).write_bytes(data)


if __name__ == '__main__': main()
