"""Tests of benchmarks/data.py."""

import gzip
import hashlib
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.tasks import data


def standardised(images: np.ndarray, train_images: np.ndarray) -> np.ndarray:
    """What the loaders must return, one channel at a time and in float64."""
    channels = [
        (images[..., c] - train_images[..., c].mean()) / train_images[..., c].std()
        for c in range(images.shape[-1])
    ]
    return np.stack(channels, axis=-1)


def assert_is_one_sentence(error: data.DataError, *parts: str) -> None:
    message = str(error)
    assert "\n" not in message and message.endswith(".") and ". " not in message
    for part in parts:
        assert part in message


# Splits.


@pytest.fixture(scope="module", params=["mnist5k", "digits"])
def packaged(request: pytest.FixtureRequest) -> data.Dataset:
    return data.load(request.param)


def test_split_is_stratified_and_disjoint(packaged: data.Dataset) -> None:
    sizes = {"mnist5k": (4000, 1000), "digits": (1437, 360)}[packaged.name]
    assert (len(packaged.train_labels), len(packaged.test_labels)) == sizes

    train_counts = np.bincount(packaged.train_labels, minlength=10)
    test_counts = np.bincount(packaged.test_labels, minlength=10)
    fair = (train_counts + test_counts) * sizes[1] / sum(sizes)
    assert np.abs(test_counts - fair).max() < 1

    train = {image.tobytes() for image in packaged.train_images}
    assert train.isdisjoint(image.tobytes() for image in packaged.test_images)


def test_split_is_the_one_that_results_were_measured_on(packaged: data.Dataset) -> None:
    first_ten = {
        "mnist5k": [6, 3, 0, 8, 8, 3, 0, 0, 7, 8],
        "digits": [7, 6, 3, 7, 7, 3, 2, 8, 9, 3],
    }
    assert packaged.test_labels[:10].tolist() == first_ten[packaged.name]


def test_images_are_standardised_with_the_training_part(packaged: data.Dataset) -> None:
    assert packaged.train_images.dtype == packaged.test_images.dtype == np.float32
    assert packaged.train_labels.dtype == packaged.test_labels.dtype == np.int32
    assert packaged.train_images.shape[1:] == packaged.test_images.shape[1:]
    np.testing.assert_allclose(
        packaged.train_images.mean(dtype=np.float64), 0, atol=1e-6
    )
    np.testing.assert_allclose(
        packaged.train_images.std(dtype=np.float64), 1, rtol=1e-6
    )
    # Its own mean would be exactly zero.
    assert abs(packaged.test_images.mean(dtype=np.float64)) > 1e-4


def test_load_rejects_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"'svhn': choose from mnist5k, digits, "):
        data.load("svhn")


# Hold-out.


@pytest.fixture
def numbered() -> data.Dataset:
    """Image i is filled with the number i and labelled i modulo 5; no test part."""
    numbers = np.arange(100)
    images = np.broadcast_to(numbers[:, None, None, None], (100, 2, 2, 1))
    return data.Dataset(
        name="numbered",
        train_images=images.astype(np.float32),
        train_labels=(numbers % 5).astype(np.int32),
        test_images=np.full((10, 2, 2, 1), np.nan, np.float32),
        test_labels=np.full(10, -1, np.int32),
        num_classes=5,
    )


def test_hold_out_splits_the_training_part(numbered: data.Dataset) -> None:
    held_out = data.hold_out(numbered, fraction=0.3)
    assert np.bincount(held_out.train_labels).tolist() == [14] * 5
    assert np.bincount(held_out.test_labels).tolist() == [6] * 5
    # Standardising keeps the order, so sorting finds out which image is which.
    pixels = np.concatenate([held_out.train_images, held_out.test_images])[:, 0, 0, 0]
    labels = np.concatenate([held_out.train_labels, held_out.test_labels])
    assert len(np.unique(pixels)) == 100
    np.testing.assert_array_equal(labels[np.argsort(pixels)], np.arange(100) % 5)


def test_hold_out_leaves_nothing_of_the_test_part(numbered: data.Dataset) -> None:
    held_out = data.hold_out(numbered)
    arrays = [field for field in held_out if isinstance(field, np.ndarray)]
    assert len(arrays) == 4
    for array in arrays:
        assert np.isfinite(array).all() and (array != -1).all()
        assert not np.shares_memory(array, numbered.test_images)
        assert not np.shares_memory(array, numbered.test_labels)


def test_hold_out_standardises_with_what_remains(numbered: data.Dataset) -> None:
    held_out = data.hold_out(numbered)
    np.testing.assert_allclose(held_out.train_images.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(held_out.train_images.std(), 1, rtol=1e-6)


def test_hold_out_depends_on_the_seed_only(numbered: data.Dataset) -> None:
    first, again, other = (data.hold_out(numbered, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train_images, again.train_images)
    assert not np.array_equal(first.train_images, other.train_images)


# Label noise.


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4004, 1.0])
def test_noise_replaces_exactly_the_fraction(fraction: float) -> None:
    # 10 is never drawn, so that each replaced label shows.
    labels = np.full(1000, 10, np.int32)
    noisy = data.add_label_noise(labels, fraction, num_classes=10, seed=0)
    assert (noisy != 10).sum() == round(fraction * 1000)
    assert noisy.dtype == np.int32
    assert (labels == 10).all()


def test_noise_is_uniform_over_all_classes_and_the_examples() -> None:
    labels = np.full(50_000, 10)
    noisy = data.add_label_noise(labels, 0.5, num_classes=10, seed=0)
    # Ten binomial counts of mean 2,500 and deviation 47; and one, of deviation 56, of
    # how many of the replaced labels lie in the first half.
    assert np.abs(np.bincount(noisy)[:10] - 2500).max() < 5 * 47
    assert abs((noisy[:25_000] != 10).sum() - 12_500) < 5 * 56


def test_noise_depends_on_the_seed_only() -> None:
    labels = np.arange(100) % 10
    first, again, other = (data.add_label_noise(labels, 0.5, 10, s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_noise_rejects_what_is_no_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
        data.add_label_noise(np.zeros(10, np.int32), fraction, 10, seed=0)


# Batches.


def test_batches_are_full_and_disjoint() -> None:
    epoch = list(data.batches(103, 10, np.random.default_rng(0)))
    assert [batch.shape for batch in epoch] == [(10,)] * 10
    indices = np.concatenate(epoch)
    assert len(np.unique(indices)) == 100
    assert indices.min() >= 0 and indices.max() < 103
    assert not np.array_equal(indices, np.sort(indices))


def test_each_epoch_has_its_own_order_and_the_seed_repeats_it() -> None:
    def two_epochs(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.stack([np.stack([*data.batches(20, 5, rng)]) for _ in range(2)])

    epochs = two_epochs(0)
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(epochs, two_epochs(0))


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batches_rejects_a_size_that_no_batch_can_have(batch_size: int) -> None:
    with pytest.raises(ValueError, match="batch_size must be between 1 and the 10"):
        data.batches(10, batch_size, np.random.default_rng(0))


# Fashion-MNIST.


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def fashion() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": rng.integers(256, size=(20, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": rng.integers(10, size=20, dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(256, size=(6, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(10, size=6, dtype=np.uint8),
    }


@pytest.fixture
def fashion_folder(fashion: dict[str, np.ndarray], tmp_path: Path) -> Path:
    for name, array in fashion.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


def assert_is_fashion(dataset: data.Dataset, fashion: dict[str, np.ndarray]) -> None:
    train_images, train_labels, test_images, test_labels = fashion.values()
    train_images, test_images = train_images[..., None], test_images[..., None]
    np.testing.assert_allclose(
        dataset.train_images, standardised(train_images, train_images), atol=1e-5
    )
    np.testing.assert_allclose(
        dataset.test_images, standardised(test_images, train_images), atol=1e-5
    )
    np.testing.assert_array_equal(dataset.train_labels, train_labels)
    np.testing.assert_array_equal(dataset.test_labels, test_labels)


def test_fashion_mnist_is_read_compressed(
    fashion: dict[str, np.ndarray], fashion_folder: Path
) -> None:
    assert_is_fashion(data.load("fashion_mnist", fashion_folder), fashion)


def test_fashion_mnist_is_read_uncompressed(
    fashion: dict[str, np.ndarray], tmp_path: Path
) -> None:
    for name, array in fashion.items():
        (tmp_path / name).write_bytes(idx(array))
    assert_is_fashion(data.load("fashion_mnist", str(tmp_path)), fashion)


def compressed(edit: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: gzip.compress(edit(gzip.decompress(content)))


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda content: content[:-20], id="truncated gzip"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"<html>404</html>", id="not gzip"),
        pytest.param(lambda content: content[:40] + b"?" + content[41:], id="bit rot"),
        pytest.param(compressed(lambda content: content[:-1]), id="too short"),
        pytest.param(compressed(lambda content: content + b"0"), id="too long"),
        pytest.param(compressed(lambda content: content[:6]), id="half a header"),
        pytest.param(
            compressed(lambda content: b"\x00\x00\x0d" + content[3:]), id="of floats"
        ),
    ],
)
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_idx_file_is_named(
    fashion_folder: Path, name: str, edit: Callable[[bytes], bytes]
) -> None:
    path = fashion_folder / f"{name}.gz"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(data.DataError) as caught:
        data.load("fashion_mnist", fashion_folder)
    assert_is_one_sentence(
        caught.value,
        f"{path} is damaged",
        "`apt-get install dataset-fashion-mnist`",
        "--data-dir",
    )


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.zeros(19, np.uint8), "20 images, but labels of shape (19,)"),
        (np.full(20, 10, np.uint8), "a label is not in [0, 10)"),
    ],
)
def test_labels_that_do_not_fit_are_damage(
    fashion_folder: Path, labels: np.ndarray, reason: str
) -> None:
    path = fashion_folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(data.DataError) as caught:
        data.load("fashion_mnist", fashion_folder)
    assert_is_one_sentence(caught.value, "is damaged", reason)


def test_missing_idx_file_is_named(fashion_folder: Path) -> None:
    path = fashion_folder / "t10k-labels-idx1-ubyte.gz"
    path.unlink()
    with pytest.raises(data.DataError) as caught:
        data.load("fashion_mnist", fashion_folder)
    assert_is_one_sentence(
        caught.value, f"{path} is missing", "`apt-get install dataset-fashion-mnist`"
    )


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache that is empty, without Debian's files, fed from a folder."""
    cache = tmp_path / "home" / "cache"
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "not-installed")
    monkeypatch.setattr(data, "_FASHION_CACHE", cache)
    monkeypatch.setattr(data, "_FASHION_URL", f"{tmp_path.as_uri()}/")
    return cache


def test_fashion_mnist_is_downloaded_once(
    monkeypatch: pytest.MonkeyPatch,
    fashion: dict[str, np.ndarray],
    fashion_folder: Path,
    cache: Path,
) -> None:
    files = {path.name: path for path in fashion_folder.glob("*.gz")}
    md5 = {n: hashlib.md5(path.read_bytes()).hexdigest() for n, path in files.items()}
    monkeypatch.setattr(data, "_FASHION_MD5", md5)
    assert_is_fashion(data.load("fashion_mnist"), fashion)
    assert {path.name for path in cache.iterdir()} == set(files)

    for path in files.values():
        path.unlink()
    assert_is_fashion(data.load("fashion_mnist"), fashion)


def test_download_with_another_checksum_is_not_kept(
    fashion_folder: Path, cache: Path
) -> None:
    with pytest.raises(data.DataError) as caught:
        data.load("fashion_mnist")
    assert_is_one_sentence(caught.value, "train-images-idx3-ubyte.gz is damaged", "MD5")
    assert not cache.exists()


def test_download_that_fails_says_what_else_to_do(cache: Path) -> None:
    with pytest.raises(data.DataError) as caught:
        data.load("fashion_mnist")
    assert_is_one_sentence(
        caught.value,
        f"{cache / 'train-images-idx3-ubyte.gz'} is missing and cannot be downloaded",
        "`apt-get install dataset-fashion-mnist`",
    )


@pytest.mark.skipif(
    not data.DEBIAN_FASHION.is_dir(),
    reason="needs the Debian package dataset-fashion-mnist",
)
def test_real_fashion_mnist_is_whole() -> None:
    dataset = data.load("fashion_mnist")
    assert dataset.train_images.shape == (60_000, 28, 28, 1)
    assert dataset.test_images.shape == (10_000, 28, 28, 1)
    assert np.bincount(dataset.train_labels).tolist() == [6000] * 10
    assert np.bincount(dataset.test_labels).tolist() == [1000] * 10


# CIFAR.

Files = dict[str, tuple[np.ndarray, np.ndarray]]
CIFAR = {
    "cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py", "labels"),
    "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python", "fine_labels"),
}


@pytest.fixture
def cifar() -> dict[str, Files]:
    rng = np.random.default_rng(0)

    def random(size: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
        images = rng.integers(256, size=(size, 32, 32, 3), dtype=np.uint8)
        return images, rng.integers(classes, size=size)

    batches = [f"data_batch_{i}" for i in range(1, 6)]
    return {
        "cifar10": {name: random(4, 10) for name in [*batches, "test_batch"]},
        "cifar100": {name: random(12, 100) for name in ["train", "test"]},
    }


def rows(images: np.ndarray) -> np.ndarray:
    """The red, green and blue plane of each image, one after another."""
    planes = [images[..., c].reshape(len(images), -1) for c in range(3)]
    return np.concatenate(planes, axis=1)


def python2_pickle(images: np.ndarray, label_key: str, labels: np.ndarray) -> bytes:
    """The opcodes that Python 2 and NumPy 1 wrote into the published files."""
    pixels = rows(images).tobytes()
    return b"".join(
        [
            b"\x80\x02}(U\x04data",
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n",
            b"K\x00\x85U\x01b\x87R(K\x01",
            b"K" + bytes([len(images)]) + b"M" + struct.pack("<H", 3072),
            b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R",
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89T" + struct.pack("<i", len(pixels)) + pixels + b"tb",
            b"U" + bytes([len(label_key)]) + label_key.encode(),
            b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"eu.",
        ]
    )


def python3_pickle(images: np.ndarray, label_key: str, labels: np.ndarray) -> bytes:
    return pickle.dumps({"data": rows(images), label_key: list(labels)})


def write_cifar(
    folder: Path, name: str, files: Files, dump: Callable[..., bytes] = python2_pickle
) -> Path:
    """Writes the unpacked folder and returns it."""
    target = folder / CIFAR[name][1]
    target.mkdir()
    for file_name, (images, labels) in files.items():
        content = dump(images, CIFAR[name][2], labels)
        (target / file_name).write_bytes(content)
    return target


def archive(folder: Path, name: str) -> Path:
    """Packs the folder, removes it and returns the archive."""
    path = folder.parent / CIFAR[name][0]
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    return path


@pytest.mark.parametrize("dump", [python2_pickle, python3_pickle])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CIFAR)
def test_cifar_is_read(
    tmp_path: Path,
    cifar: dict[str, Files],
    name: str,
    packed: bool,
    dump: Callable[..., bytes],
) -> None:
    *train, (test_images, test_labels) = cifar[name].values()
    train_images = np.concatenate([images for images, _ in train])
    folder = write_cifar(tmp_path, name, cifar[name], dump)
    if packed:
        archive(folder, name)

    dataset = data.load(name, tmp_path)
    assert dataset.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    assert dataset.train_images.dtype == np.float32
    assert dataset.train_labels.dtype == np.int32
    np.testing.assert_allclose(
        dataset.train_images, standardised(train_images, train_images), atol=1e-5
    )
    np.testing.assert_allclose(
        dataset.test_images, standardised(test_images, train_images), atol=1e-5
    )
    np.testing.assert_array_equal(
        dataset.train_labels, np.concatenate([labels for _, labels in train])
    )
    np.testing.assert_array_equal(dataset.test_labels, test_labels)


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_refused_before_it_acts(
    tmp_path: Path, cifar: dict[str, Files], protocol: int
) -> None:
    made = tmp_path / "made"
    malicious = pickle.dumps({"data": MakesFolder(made)}, protocol)
    pickle.loads(malicious)
    assert made.exists(), "the attack must work on an unguarded reader"
    made.rmdir()

    folder = write_cifar(tmp_path, "cifar10", cifar["cifar10"])
    (folder / "data_batch_3").write_bytes(malicious)
    with pytest.raises(data.DataError) as caught:
        data.load("cifar10", tmp_path)
    assert not made.exists()
    message = str(caught.value)
    assert f"{folder / 'data_batch_3'} is damaged" in message
    assert "refused to load" in message and "mkdir" in message


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy._core.multiarray", "_reconstruct.__self__"),
        ("numpy.f2py.diagnose", "run"),
    ],
)
def test_only_what_arrays_need_can_be_named(
    tmp_path: Path, cifar: dict[str, Files], module: str, name: str
) -> None:
    folder = write_cifar(tmp_path, "cifar100", cifar["cifar100"])
    names = b"".join(
        b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)
    )
    (folder / "test").write_bytes(b"\x80\x04" + names + b"\x93.")
    with pytest.raises(data.DataError, match=rf"refused to load {module}\.{name}, "):
        data.load("cifar100", tmp_path)


def test_damaged_archive_is_named(tmp_path: Path, cifar: dict[str, Files]) -> None:
    path = archive(write_cifar(tmp_path, "cifar10", cifar["cifar10"]), "cifar10")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"<html>404</html>", b""):
        path.write_bytes(damaged)
        with pytest.raises(data.DataError) as caught:
            data.load("cifar10", tmp_path)
        assert_is_one_sentence(
            caught.value,
            f"{path} is damaged",
            "get cifar-10-python.tar.gz from",
            "--data-dir",
        )


def batch(label_key: str = "labels", **changes: Any) -> bytes:
    pixels = np.zeros((4, 3072), np.uint8)
    return pickle.dumps({"data": pixels, label_key: [0, 1, 2, 3]} | changes)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (batch()[:-100], "UnpicklingError"),
        (b"", "EOFError"),
        (pickle.dumps([1, 2]), "TypeError"),
        (batch(label_key="fine_labels"), "KeyError: 'labels'"),
        (batch(data=np.zeros((4, 3000), np.uint8)), "cannot reshape"),
        (batch(data=np.zeros((4, 3072))), "pixels of type float64"),
        (batch(labels=[0, 1, 2]), "4 images, but labels of shape (3,)"),
        (batch(labels=[0, 1, 2, 10]), "a label is not in [0, 10)"),
        (batch(labels=[0, 1, 2, -1]), "a label is not in [0, 10)"),
    ],
)
def test_damaged_batch_is_named(
    tmp_path: Path, cifar: dict[str, Files], content: bytes, reason: str
) -> None:
    folder = write_cifar(tmp_path, "cifar10", cifar["cifar10"])
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(data.DataError) as caught:
        data.load("cifar10", tmp_path)
    assert_is_one_sentence(
        caught.value, f"{folder / 'test_batch'} is damaged", reason, "--data-dir"
    )


@pytest.mark.parametrize("packed", [True, False])
def test_missing_batch_is_named(
    tmp_path: Path, cifar: dict[str, Files], packed: bool
) -> None:
    del cifar["cifar10"]["data_batch_2"]
    source = write_cifar(tmp_path, "cifar10", cifar["cifar10"])
    if packed:
        source = archive(source, "cifar10")
    with pytest.raises(data.DataError) as caught:
        data.load("cifar10", tmp_path)
    assert_is_one_sentence(caught.value, f"{source} is damaged (no data_batch_2 in it)")


@pytest.mark.parametrize("name", CIFAR)
def test_missing_cifar_names_the_archive(tmp_path: Path, name: str) -> None:
    for data_dir in (None, tmp_path):
        with pytest.raises(data.DataError) as caught:
            data.load(name, data_dir)
        assert_is_one_sentence(caught.value, f"get {CIFAR[name][0]} from", "--data-dir")
