"Temporary: private names of the old `balms.data`, until nobody imports them."
import errno, io, os, stat
from zipfile import ZIP_STORED
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

def _uncompressed(z):
    "An open `.npz` file. Raises `ValueError` if anything in it is compressed: a small one could ask for all memory"
    if any(i.compress_type != ZIP_STORED for i in z.zip.infolist()): raise ValueError('it is compressed')
    return z

_MOST, _LARGEST = 178_956_970, 2**30                                          # pixels of an image, bytes of its file

def _check_pixels(w, h):
    "Raises `ValueError` for more pixels than an image may have"
    if w*h > _MOST: raise ValueError(f'{w:,} x {h:,} pixels, more than the {_MOST:,} that an image may have')

def _check_regular(path):
    "The status of a file. Raises `OSError` for a pipe, a device, and what is not there"
    s = os.stat(path)
    if not (stat.S_ISREG(s.st_mode) or stat.S_ISDIR(s.st_mode)): raise OSError(errno.EINVAL, 'a pipe or a device, not a file', str(path))     # of a folder the system says so
    return s

def _read_file(path):
    "The bytes of an image file. Raises `OSError` for what is no file, or too large to be an image"
    if (n := _check_regular(path).st_size) > _LARGEST: raise OSError(errno.EFBIG, f'{n:,} bytes, more than an image file may have', str(path))
    with open(path, 'rb') as f: return f.read()

def _deep(im, data):
    "Whether an image that Pillow has opened has more than 8 bits a channel; to say so of JPEG 2000 and AVIF needs the file's bytes"
    if im.mode[0] in 'IF': return True
    if im.format == 'TIFF': return max(im.tag_v2.get(258, (1,))) > 8                               # BitsPerSample
    if im.format == 'JPEG2000': i = data.find(b'\xff\x4f\xff\x51'); return i >= 0 and data[i + 42] & 127 > 7     # Ssiz of the first channel
    if im.format == 'AVIF': i = data.find(b'av1C'); return i >= 0 and bool(data[i + 6] & 64)       # high_bitdepth
    decoder, *_, args = im.tile[0] if im.tile else ('', '')
    args = args if isinstance(args, (tuple, list)) else (args,)
    if im.format == 'PPM': return isinstance(args[-1], int) and args[-1] > 255    # the largest value
    return decoder == 'SGI16' or any(isinstance(a, str) and a.endswith(('16B', '16L', '16N')) for a in args)      # PNG, SGI

def _opened(data):
    "An image file (bytes) as Pillow opens it, of which nothing is decoded yet. Raises `ValueError` for what is no image, has too many pixels, several frames, or more than 8 bits a channel"
    try: im = Image.open(io.BytesIO(data))
    except UnidentifiedImageError: raise ValueError('not an image') from None
    if im.format == 'EPS': raise ValueError('a program, not an image')
    _check_pixels(*im.size)
    if _deep(im, data): raise ValueError('more than 8 bits a channel, which would be cut off')
    if im.format not in ('MPO', 'PSD') and getattr(im, 'is_animated', False):
        raise ValueError(f'{im.n_frames if im.format in ("GIF", "PNG", "WEBP") else "several"} frames, where one image should be')
    return im

def _turned(im):
    "An image that stands as its orientation tag says; itself if it does already"
    im.load()                                                                 # some formats have their tags at the end
    return ImageOps.exif_transpose(im) if im.getexif().get(0x112, 1) in range(2, 9) else im

def _rgb(im, strip=2**22):
    "The pixels of an image as uint8 (h, w, 3), converted at most `strip` at a time"
    w, h = im.size
    if w*h <= strip: return np.array(im.convert('RGB'))
    im.load(); x, n = np.empty((h, w, 3), np.uint8), max(1, strip//w)
    for y in range(0, h, n): x[y:y + n] = im.crop((0, y, w, min(h, y + n))).convert('RGB')
    return x
