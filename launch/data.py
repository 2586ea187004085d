"""The images that examples and measurements train on, always 28 x 28 grey bytes with labels 0 to 9.

Looked for in this order: `--data DIR` with the four idx files of Fashion-MNIST or MNIST (gzipped or not), Debian's package
dataset-fashion-mnist, the handwritten digits that come with scikit-learn (launch/setup exports them for the C++ trainer, which
looks in the same order). `Dataset.source` says which one it became.

    python launch/data.py                   says what would be used
    python launch/data.py --export DIR      writes it as idx files, which the C++ trainer reads with --data DIR
"""

import argparse
import gzip
import pathlib
import struct
import sys
from dataclasses import dataclass

import numpy

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


class DataError(ValueError):
    """The data cannot be used; the text says which file and why."""


@dataclass(frozen=True)
class Dataset:
    source: str
    train_images: numpy.ndarray  # (n, 28, 28) uint8
    train_labels: numpy.ndarray  # (n,) uint8
    test_images: numpy.ndarray
    test_labels: numpy.ndarray


def read_idx(path: pathlib.Path) -> numpy.ndarray:
    """An array of bytes in the idx format: 0, 0, 8 (bytes), number of dimensions, the dimensions as big-endian 32-bit words, the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{path}: not an idx file of bytes (it must start with 00 00 08)")
    dims = raw[3]
    if len(raw) < 4 + 4 * dims:
        raise DataError(f"{path}: ends within its header")
    shape = struct.unpack_from(f">{dims}I", raw, 4)
    expected = 4 + 4 * dims + int(numpy.prod(shape, dtype=numpy.int64))
    if len(raw) != expected:
        raise DataError(f"{path}: {len(raw)} bytes, but its header {shape} asks for {expected}")
    return numpy.frombuffer(raw, numpy.uint8, offset=4 + 4 * dims).reshape(shape)


def find_idx(folder: pathlib.Path, stem: str) -> pathlib.Path | None:
    return next((path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()), None)


def load_idx(folder: pathlib.Path, source: str) -> Dataset:
    paths = {name: find_idx(folder, stem) for name, stem in FILES.items()}
    missing = [FILES[name] + "[.gz]" for name, path in paths.items() if path is None]
    if missing:
        raise DataError(f"{folder}: missing {', '.join(missing)}")
    arrays = {name: read_idx(path) for name, path in paths.items()}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        where = paths[f"{part}_images"]
        if images.ndim != 3 or images.shape[1:] != (28, 28):
            raise DataError(f"{where}: shape {images.shape}, but images are (n, 28, 28)")
        if len(images) == 0:
            raise DataError(f"{where}: holds no images")
        if labels.shape != (len(images),):
            raise DataError(f"{paths[f'{part}_labels']}: shape {labels.shape} for {len(images)} images")
        if labels.max() > 9:
            raise DataError(f"{paths[f'{part}_labels']}: label {labels.max()}, allowed are 0 to 9")
    return Dataset(source, **arrays)


def load_digits() -> Dataset:
    """1,797 digits of 8 x 8 pixels with 16 greys, each pixel 3 x 3 times, centred in 28 x 28; every fifth image is for testing."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise DataError(f"no data: {DEBIAN} is not there (Debian package dataset-fashion-mnist), scikit-learn is not installed, and --data names no folder") from None
    images, labels = load(return_X_y=True)
    small = numpy.minimum(images.reshape(-1, 8, 8) * 16, 255).astype(numpy.uint8)
    large = numpy.pad(small.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    test = numpy.arange(len(large)) % 5 == 4
    labels = labels.astype(numpy.uint8)
    return Dataset("scikit-learn's digits (Fashion-MNIST is not installed)", large[~test], labels[~test], large[test], labels[test])


def load(folder: str | None = None) -> Dataset:
    """The data, from `folder` if one is named. Raises DataError."""
    if folder:
        return load_idx(pathlib.Path(folder), f"idx files in {folder}")
    if DEBIAN.is_dir():
        return load_idx(DEBIAN, "Fashion-MNIST (Debian package dataset-fashion-mnist)")
    return load_digits()


def epoch_steps(data: Dataset, subset: int, world: int, batch: int) -> int:
    """Steps of an epoch over the first `subset` images (0: all) in whole batches of `batch` per rank. Raises DataError where there is none."""
    images = min(subset or len(data.train_images), len(data.train_images))
    if images < world * batch:
        raise DataError(f"{images} images are too few for {world} ranks of batch {batch}")
    return images // (world * batch)


def export(data: Dataset, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, stem in FILES.items():
        array = getattr(data, name)
        header = struct.pack(f">2xBB{array.ndim}I", 8, array.ndim, *array.shape)
        (folder / stem).write_bytes(header + array.tobytes())


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/data.py", description="Says which data would be used, or writes it as idx files.")
    parser.add_argument("--data", metavar="DIR", help="a folder with the four idx files")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits, whatever else is there")
    parser.add_argument("--export", metavar="DIR", type=pathlib.Path, help="write the four idx files into this folder")
    options = parser.parse_args()
    try:
        data = load_digits() if options.digits else load(options.data)
    except DataError as error:
        print(f"data: {error}", file=sys.stderr)
        return 2
    print(f"{data.source}: {len(data.train_images)} images to train on, {len(data.test_images)} to test")
    if options.export:
        export(data, options.export)
        print(f"written to {options.export}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
