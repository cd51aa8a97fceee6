import functools
import gzip
import hashlib
import http.server
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import joblib
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from adv.lab import data
from adv.lab.data import File, Split

REAL = os.environ.get("ADV_DATA", "")
real = pytest.mark.skipif(not REAL, reason="ADV_DATA is not set")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty ADV_DATA and an empty cache; the table of files may be changed."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("ADV_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "FILES", dict(data.FILES))
    monkeypatch.setattr(data, "DOWNLOADS", dict(data.DOWNLOADS))
    return tmp_path / "data"


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def declare(name: str, folder: Path) -> None:
    """Take the digests of the files that are there as the published ones."""

    def known(file: File) -> File:
        path = folder / file.path
        if not path.is_file():
            return file
        return File(file.path, f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}", None)

    data.FILES[name] = tuple(tuple(map(known, options)) for options in data.FILES[name])


def bytes_of(split: Split) -> np.ndarray:
    """The original 8-bit images, (N, C, H, W)."""
    scaled = split.x.double() * 255
    assert (scaled - scaled.round()).abs().max() < 1e-4
    return scaled.round().byte().numpy()


def idx(array: np.ndarray) -> bytes:
    return (
        struct.pack(">HBB", 0, 8, array.ndim)
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def numbered(n: int, *shape: int) -> np.ndarray:
    """Images of noise whose first value is their number."""
    images = np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)
    images.reshape(n, -1)[:, 0] = np.arange(n)
    return images


def mnist_files(folder: Path, name: str = "mnist", *, raw: bool = False) -> dict[str, np.ndarray]:
    """60 training images and 20 test images with labels 0..9, in MNIST's layout."""
    arrays = {
        "train-images-idx3-ubyte": numbered(60, 28, 28),
        "train-labels-idx1-ubyte": (np.arange(60) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": numbered(20, 28, 28),
        "t10k-labels-idx1-ubyte": (np.arange(20) % 10).astype(np.uint8),
    }
    base = folder / ("MNIST/raw" if name == "mnist" else "FashionMNIST/raw")
    for stem, array in arrays.items():
        content = idx(array)
        write(base / (stem if raw else stem + ".gz"), content if raw else gzip.compress(content))
    return arrays


# The sets that need no file


def test_digits_are_scikit_learns_divided_by_16_and_each_stands_in_one_part():
    digits = data.load("digits")
    bunch = load_digits()
    parts = (digits.train, digits.val, digits.test)
    assert [len(part) for part in parts] == [1297, 100, 400]
    got = Counter(
        (tuple((p.x[i] * 16).int().flatten().tolist()), int(p.y[i]))
        for p in parts
        for i in range(len(p))
    )
    want = Counter(
        (tuple(map(int, row)), int(y)) for row, y in zip(bunch.data, bunch.target, strict=True)
    )
    assert got == want
    assert digits.train.x.dtype == torch.float32
    assert digits.train.y.dtype == torch.int64
    assert digits.train.x.shape[1:] == (1, 8, 8)
    assert digits.complete


def test_the_digits_split_is_stratified_and_never_changes():
    digits = data.load("digits")
    frequency = np.bincount(load_digits().target) / 1797
    for part in (digits.train, digits.val, digits.test):
        assert np.abs(np.bincount(part.y.numpy()) - len(part) * frequency).max() <= 1
    digest = hashlib.sha256((digits.test.x * 16).byte().numpy().tobytes()).hexdigest()
    assert digest[:16] == "b4001a357afea666"


def test_patches_cut_the_photographs_without_overlap_and_each_stands_in_one_part():
    patches = data.load("patches")
    parts = (patches.train, patches.val, patches.test)
    assert [len(part) for part in parts] == [1480, 200, 400]
    want = Counter()
    for label, name in enumerate(patches.classes):
        photograph = load_sample_image(f"{name}.jpg")
        for row in range(0, 427 - 15, 16):
            for column in range(0, 640 - 15, 16):
                want[photograph[row : row + 16, column : column + 16].tobytes(), label] += 1
    got = Counter(
        (image.transpose(1, 2, 0).tobytes(), int(y))
        for part in parts
        for image, y in zip(bytes_of(part), part.y, strict=True)
    )
    assert got == want
    assert patches.test.y.bincount().tolist() == [200, 200]
    assert hashlib.sha256(bytes_of(patches.test).tobytes()).hexdigest()[:16] == "b28b62f7f5755e29"
    assert set(patches.train.take(20).y.tolist()) == {0, 1}


def test_loading_leaves_the_global_random_states_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    data.load("digits")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_limit_keeps_the_first_samples_and_says_so():
    whole, part = data.load("digits"), data.load("digits", limit=150)
    assert [len(p) for p in (part.train, part.val, part.test)] == [150, 100, 150]
    assert torch.equal(part.train.x, whole.train.x[:150])
    assert not part.complete
    assert "first 150" in part.note
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="at least 1"):
            data.load("digits", limit=wrong)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'cifar'.*cifar10-subset"):
        data.load("cifar")


# Splits


def test_split_indexing():
    digits = data.load("digits").val
    wanted = torch.tensor([5, 2])
    assert torch.equal(digits[wanted].x, digits.x[wanted])
    assert torch.equal(digits[digits.y == 3].y, torch.full((10,), 3))
    assert torch.equal(digits.take(7).x, digits.x[:7])
    assert torch.equal(digits.take(np.int64(7)).x, digits.x[:7])
    assert len(digits[10:30]) == 20
    assert digits.to("cpu").x.device.type == "cpu"
    with pytest.raises(ValueError, match="100 samples"):
        digits.take(101)
    for wrong in (0, 2.5, True):
        with pytest.raises(ValueError, match="take"):
            digits.take(wrong)
    with pytest.raises(TypeError, match="int64 labels"):
        Split(torch.zeros(4, 1, 8, 8), torch.zeros(4))
    with pytest.raises(TypeError, match="slice or a 1-d tensor"):
        digits[3]
    with pytest.raises(ValueError, match=r"inputs \(N, ...\)"):
        Split(torch.zeros(4), torch.zeros(4, dtype=torch.long))
    with pytest.raises(TypeError, match="takes tensors, not ndarray and Tensor"):
        Split(digits.x.numpy(), digits.y)
    assert Split(digits.x.flatten(1), digits.y)[:3].x.shape == (3, 64)
    with pytest.raises(ValueError, match="labels"):
        Split(torch.zeros(4, 1, 8, 8), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"exact is \(N,\)"):
        Split(digits.x, digits.y, digits.y[:3] > 0)
    with pytest.raises(TypeError, match=r"exact is boolean, not torch.int64"):
        Split(digits.x, digits.y, digits.y)


# MNIST and its kin


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("raw", [False, True])
def test_idx_files_gzipped_or_raw(folder, name, raw):
    arrays = mnist_files(folder, name, raw=raw)
    declare(name, folder)
    before = sorted(folder.rglob("*"))
    mnist = data.load(name)
    assert sorted(folder.rglob("*")) == before
    assert (bytes_of(mnist.test)[:, 0] == arrays["t10k-images-idx3-ubyte"]).all()
    assert (mnist.test.y.numpy() == arrays["t10k-labels-idx1-ubyte"]).all()
    assert [len(mnist.train), len(mnist.val)] == [50, 10]
    numbers = [bytes_of(part)[:, 0, 0, 0].tolist() for part in (mnist.train, mnist.val)]
    assert sorted(numbers[0] + numbers[1]) == list(range(60))
    for part, chosen in zip((mnist.train, mnist.val), numbers, strict=True):
        assert (bytes_of(part)[:, 0] == arrays["train-images-idx3-ubyte"][chosen]).all()
        assert part.y.tolist() == [n % 10 for n in chosen]
    assert numbers[1] == [2, 11, 22, 26, 28, 34, 35, 40, 58, 59]


def test_torchvision_reads_the_same_images_from_raw_files(folder):
    mnist_files(folder, raw=True)
    declare("mnist", folder)
    theirs = torchvision.datasets.MNIST(folder, train=False)
    ours = data.load("mnist").test
    assert (bytes_of(ours)[:, 0] == theirs.data.numpy()).all()
    assert torch.equal(ours.y, theirs.targets)


@settings(max_examples=25)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), fill=st.integers(0, 255))
def test_idx_round_trip(tmp_path_factory, shape, fill):
    array = np.full(shape, fill, np.uint8)
    path = tmp_path_factory.getbasetemp() / "round-trip"
    path.write_bytes(idx(array))
    assert (data._idx(path) == array).all()
    assert data._idx(path).shape == tuple(shape)
    path.write_bytes(idx(array)[:-1])
    with pytest.raises(ValueError, match="round-trip is not a complete idx file"):
        data._idx(path)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x08\x03\0\0", b"\0\0\x0d\x01\0\0\0\1\0", b"P5"]
)
def test_what_is_no_idx_file_is_refused_by_name(tmp_path, content):
    write(tmp_path / "labels", content)
    with pytest.raises(ValueError, match="labels is not a complete idx file of bytes"):
        data._idx(tmp_path / "labels")


# What is wrong with files


def test_a_missing_file_is_named_with_what_to_do(folder):
    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist")
    message = str(error.value)
    assert "MNIST/raw/train-images-idx3-ubyte.gz is not in " + str(folder) in message
    assert "`adv data mnist --download`, or in Python load('mnist', download=True)" in message
    assert str(folder.parent / "cache" / "adv" / "data") in message


def test_altered_bytes_and_wrong_sizes_are_named(folder):
    mnist_files(folder)
    declare("mnist", folder)
    path = folder / "MNIST/raw/t10k-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"t10k-labels-idx1-ubyte.gz is truncated or altered: md5 \w{32} instead of",
    ):
        data.load("mnist")
    known = data.FILES["mnist"]
    file = known[3][0]._replace(size=len(content))
    data.FILES["mnist"] = (*known[:3], (file,))
    path.write_bytes(content[:-3])
    with pytest.raises(
        ValueError,
        match=rf"gz is truncated: {len(content) - 3} bytes instead of {len(content)}\. Remove it",
    ):
        data.load("mnist")
    path.write_bytes(content + b"more")
    with pytest.raises(ValueError, match="is not the published file"):
        data.load("mnist")


@pytest.mark.parametrize("name", ["cifar10-subset", "faces", "natural"])
def test_files_without_an_address_are_checked_by_size_and_sha256(folder, name):
    with pytest.raises(FileNotFoundError, match="cannot be downloaded"):
        data.load(name, download=True)
    file = data.FILES[name][0][0]
    write(folder / file.path, b"no archive")
    with pytest.raises(ValueError, match=f"{name}.npz is truncated: 10 bytes"):
        data.load(name)
    os.truncate(folder / file.path, file.size)
    with pytest.raises(
        ValueError, match=rf"{name}.npz is truncated or altered: sha256 .*\. Put the published file"
    ):
        data.load(name)
    (folder / file.path).unlink()
    (folder / file.path).mkdir()
    with pytest.raises(ValueError, match=f"{name}.npz is a folder"):
        data.load(name)
    assert {row.name: row.state for row in data.found()}[name] == "damaged"


def test_the_subset_never_stands_in_for_cifar10(folder, tmp_path):
    images = numbered(90, 32, 32, 3)
    labels, exact = np.arange(90, dtype=np.uint8) % 10, np.arange(90) != 7
    keys = {"images": images, "labels": labels, "exact": exact}
    arrays = {f"{part}_{key}": value for part in ("train", "test") for key, value in keys.items()}
    np.savez(folder / "cifar10-subset.npz", **arrays)
    declare("cifar10-subset", folder)
    subset = data.load("cifar10-subset")
    assert (subset.name, subset.complete) == ("cifar10-subset", False)
    assert [len(p) for p in (subset.train, subset.val, subset.test)] == [81, 9, 90]
    assert (bytes_of(subset.test).transpose(0, 2, 3, 1) == images).all()
    assert subset.test.exact.logical_not().nonzero().flatten().tolist() == [7]
    assert subset.train[subset.train.exact].y.tolist() == [n % 10 for n in range(81) if n != 7]
    with pytest.raises(
        FileNotFoundError, match=r"data_batch_1 is not in .*; or set .* cifar10-subset is another"
    ):
        data.load("cifar10")


# The folders


def test_adv_data_must_be_an_absolute_folder_that_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("ADV_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder"):
        data.load("mnist")
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder"):
        data.found()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("ADV_DATA", "here")
    with pytest.raises(ValueError, match=f"ADV_DATA=here is relative.*{tmp_path}"):
        data.load("mnist", download=True)
    assert len(data.load("digits").test) == 400


def test_without_adv_data_the_cache_is_read(folder, monkeypatch):
    mnist_files(data.cache())
    declare("mnist", data.cache())
    monkeypatch.delenv("ADV_DATA")
    assert len(data.load("mnist").test) == 20


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache() == tmp_path / "adv" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data.cache() == tmp_path / "home" / ".cache" / "adv" / "data"


def test_found_tells_each_state(folder):
    rows = {row.name: row for row in data.found()}
    assert set(rows) == set(data.names())
    assert rows["digits"][:3] == ("digits", "built in", "scikit-learn")
    assert {rows[name].state for name in data.FILES} == {"missing"}
    mnist_files(folder)
    declare("mnist", folder)
    rows = {row.name: row for row in data.found(check=True)}
    assert rows["mnist"][1:3] == ("found", str(folder))
    assert rows["cifar10"].state == "missing"
    path = folder / "MNIST/raw/t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1])
    assert {row.name: row for row in data.found()}["mnist"].state == "found"
    row = {row.name: row for row in data.found(check=True)}["mnist"]
    assert row.state == "damaged"
    assert "t10k-images-idx3-ubyte.gz is truncated or altered" in row.note
    path.unlink()
    row = {row.name: row for row in data.found()}["mnist"]
    assert row.state == "incomplete"
    assert row.note.endswith("no MNIST/raw/t10k-images-idx3-ubyte.gz")


# Downloads, from a server of our own


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_download_fetches_only_what_is_not_intact_and_only_into_the_cache(folder, server):
    served, url = server
    mnist_files(served)
    declare("mnist", served)
    files = [options[0] for options in data.FILES["mnist"]]
    data.DOWNLOADS["mnist"] = tuple(data.Download(f"{url}/{file.path}", file) for file in files)
    assert len(data.load("mnist", download=True).test) == 20
    assert not list(folder.iterdir())
    damaged = data.cache() / files[2].path
    damaged.write_bytes(b"half")
    with pytest.raises(ValueError, match="t10k-images"):
        data.load("mnist")
    for file in (files[0], files[1], files[3]):
        (served / file.path).unlink()
    assert len(data.load("mnist", download=True).test) == 20
    # A damaged file of the user's own is reported, and nothing is fetched in its place.
    write(folder / files[0].path, b"mine")
    with pytest.raises(ValueError, match=str(folder / files[0].path)):
        data.load("mnist", download=True)
    assert (folder / files[0].path).read_bytes() == b"mine"


def test_a_failed_or_altered_download_names_address_and_target(folder, server):
    served, url = server
    file = data.FILES["mnist"][0][0]
    data.DOWNLOADS["mnist"] = (data.Download(f"{url}/gone.gz", file),)
    with pytest.raises(
        RuntimeError, match=rf"could not download {url}/gone.gz to .*train-images.*404"
    ):
        data.load("mnist", download=True)
    write(served / "gone.gz", b"other bytes")
    with pytest.raises(RuntimeError, match=r"could not download .*corrupted"):
        data.load("mnist", download=True)


def test_a_failed_download_by_scikit_learn_is_told_alike(folder, monkeypatch):
    def fail(**_):
        raise URLError("no network")

    monkeypatch.setattr(data, "fetch_olivetti_faces", fail)
    with pytest.raises(RuntimeError, match=r"could not download olivetti to .*no network"):
        data.load("olivetti", download=True)


def test_archives_are_unpacked_in_the_cache(folder, server, tmp_path):
    served, url = server
    cifar10_files(tmp_path)
    declare("cifar10", tmp_path)
    archive = served / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    data.DOWNLOADS["cifar10"] = (
        data.Download(f"{url}/{archive.name}", File(archive.name, f"md5:{md5}")),
    )
    assert len(data.load("cifar10", download=True).test) == 10
    (data.cache() / "cifar-10-batches-py/data_batch_3").write_bytes(b"")
    archive.unlink()
    assert len(data.load("cifar10", download=True).test) == 10


# CIFAR-10, STL-10, CelebA, Olivetti: small files of the true layout


def cifar10_files(folder: Path) -> np.ndarray:
    """Six pickled batches of ten images; returns them, (60, 3, 32, 32)."""
    images = numbered(60, 3, 32, 32)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, batch in zip(names, images.reshape(6, 10, 3072), strict=True):
        content = pickle.dumps({"labels": list(range(10)), "data": batch}, protocol=2)
        for key in (b"labels", b"data"):
            # Python 2 wrote the files: its strings have another code than those of Python 3.
            length = struct.pack("<I", len(key))
            assert b"X" + length + key in content
            content = content.replace(b"X" + length + key, b"T" + length + key)
        write(folder / "cifar-10-batches-py" / name, content)
    return images


def test_cifar10_batches_as_torchvision_reads_them(folder):
    images = cifar10_files(folder)
    with pytest.raises(ValueError, match=r"data_batch_1 is truncated or altered"):
        data.load("cifar10")
    declare("cifar10", folder)
    write(
        folder / "cifar-10-batches-py/batches.meta",
        pickle.dumps({"label_names": list("0123456789")}),
    )

    class Theirs(torchvision.datasets.CIFAR10):
        train_list = [[f"data_batch_{i}", None] for i in range(1, 6)]  # noqa: RUF012
        test_list = [["test_batch", None]]  # noqa: RUF012
        meta = {"filename": "batches.meta", "key": "label_names", "md5": None}  # noqa: RUF012

    cifar10 = data.load("cifar10")
    train, test = Theirs(folder, train=True), Theirs(folder, train=False)
    assert [len(p) for p in (cifar10.train, cifar10.val, cifar10.test)] == [45, 5, 10]
    fitted = np.concatenate([bytes_of(cifar10.train), bytes_of(cifar10.val)]).transpose(0, 2, 3, 1)
    assert (fitted == train.data).all()
    assert (bytes_of(cifar10.test).transpose(0, 2, 3, 1) == test.data).all()
    assert (bytes_of(cifar10.test) == images[50:]).all()
    assert torch.cat([cifar10.train.y, cifar10.val.y]).tolist() == train.targets
    assert cifar10.complete


def test_stl10_as_torchvision_reads_it(folder):
    arrays = {
        "train_X.bin": numbered(40, 3, 96, 96),
        "train_y.bin": np.arange(40, dtype=np.uint8) % 4 + 1,
        "unlabeled_X.bin": numbered(1, 3, 96, 96),
        "test_X.bin": numbered(5, 3, 96, 96),
        "test_y.bin": np.array([10, 1, 2, 3, 4], np.uint8),
    }
    for name, array in arrays.items():
        write(folder / "stl10_binary" / name, array.tobytes())
    with pytest.raises(
        ValueError, match=r"train_X.bin is truncated: 1,105,920 bytes instead of 138,240,000"
    ):
        data.load("stl10")
    declare("stl10", folder)

    class Theirs(torchvision.datasets.STL10):
        train_list = [["train_X.bin", None], ["train_y.bin", None], ["unlabeled_X.bin", None]]  # noqa: RUF012
        test_list = [["test_X.bin", None], ["test_y.bin", None]]  # noqa: RUF012

    stl10 = data.load("stl10")
    test, train = Theirs(folder, split="test"), Theirs(folder, split="train")
    assert (bytes_of(stl10.test) == test.data).all()
    assert stl10.test.y.tolist() == [9, 0, 1, 2, 3] == test.labels.tolist()
    assert [len(stl10.train), len(stl10.val)] == [36, 4]
    assert sorted(stl10.val.y.tolist()) == [0, 1, 2, 3]
    both = np.concatenate([bytes_of(stl10.train), bytes_of(stl10.val)])
    both = both[np.argsort(both[:, 0, 0, 0])]
    assert (both == train.data).all()


def celeba_files(folder: Path) -> None:
    """Seven images: a frame of black around the central 148x148, which is as gray as the number."""
    for i in range(1, 8):
        image = np.zeros((218, 178, 3), np.uint8)
        image[35:183, 15:163] = [30 * i, 0, 255 - 30 * i]
        (folder / "celeba/img_align_celeba").mkdir(parents=True, exist_ok=True)
        # Lossless, under the published name: readers go by content.
        Image.fromarray(image).save(folder / f"celeba/img_align_celeba/{i:06}.jpg", "PNG")
    rows = "".join(
        f"{i:06}.jpg {'1' if i % 2 else '-1'} {'-1' if i % 3 else ' 1'}\n" for i in range(1, 8)
    )
    write(folder / "celeba/list_attr_celeba.txt", f"7\nSmiling Young \n{rows}".encode())
    parts = "".join(f"{i:06}.jpg {part}\n" for i, part in enumerate([0, 0, 2, 1, 0, 2, 0], 1))
    write(folder / "celeba/list_eval_partition.txt", parts.encode())


@pytest.mark.parametrize("zipped", [False, True])
def test_celeba_from_a_folder_or_the_zip(folder, zipped, monkeypatch):
    celeba_files(folder)
    opened = []

    class Watched(zipfile.ZipFile):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            opened.append(self)

    if zipped:
        images = folder / "celeba/img_align_celeba"
        with zipfile.ZipFile(folder / "celeba/img_align_celeba.zip", "w") as archive:
            for path in images.iterdir():
                archive.write(path, f"img_align_celeba/{path.name}")
                path.unlink()
        images.rmdir()
    with pytest.raises(
        ValueError, match="img_align_celeba.zip is trunc" if zipped else "attr_celeba.txt is trunc"
    ):
        data.load("celeba")
    declare("celeba", folder)
    monkeypatch.setattr(zipfile, "ZipFile", Watched)
    celeba = data.load("celeba")
    numbers = {"train": [1, 2, 5, 7], "val": [4], "test": [3, 6]}
    for part, wanted in numbers.items():
        split = getattr(celeba, part)
        color = np.array([[30 * i, 0, 255 - 30 * i] for i in wanted], np.uint8)
        assert split.x.shape == (len(wanted), 3, 64, 64)
        assert (bytes_of(split) == color[:, :, None, None]).all()
        assert split.y.tolist() == [i % 2 for i in wanted]
    some = data.load("celeba", limit=2)
    assert torch.equal(some.train.x, celeba.train.x[:2])
    assert (celeba.complete, some.complete) == (True, False)
    assert len(opened) == (6 if zipped else 0), "one for each part"
    assert all(archive.fp is None for archive in opened), "they are closed"


def test_celeba_names_a_missing_image(folder):
    celeba_files(folder)
    declare("celeba", folder)
    (folder / "celeba/img_align_celeba/000004.jpg").unlink()
    with pytest.raises(ValueError, match=r"img_align_celeba lacks 000004.jpg"):
        data.load("celeba")


def test_olivetti_as_scikit_learn_stores_it(folder):
    # scikit-learn keeps the faces transposed, 400 rows of 4,096 values.
    images = np.random.default_rng(0).integers(0, 256, (400, 64, 64)) / 255
    images[0, 0, :2] = 0, 1
    joblib.dump(images.transpose(0, 2, 1).reshape(400, -1), folder / "olivetti_py3.pkz", compress=6)
    olivetti = data.load("olivetti")
    assert [len(p) for p in (olivetti.train, olivetti.val, olivetti.test)] == [280, 40, 80]
    assert np.allclose(olivetti.val.x[:, 0], images[7::10], atol=1e-6)
    assert np.allclose(olivetti.test.x[40:, 0], images[9::10], atol=1e-6)
    assert olivetti.train.y[:41].tolist() == [*range(40), 0]
    write(folder / "olivetti_py3.pkz", b"damaged")
    with pytest.raises(ValueError, match=r"olivetti_py3\.pkz is truncated or altered"):
        data.load("olivetti")


def test_digests_are_torchvisions():
    theirs = torchvision.datasets

    def table(name: str) -> dict[str, str]:
        hits = [options[0] for options in data.FILES[name]]
        return {Path(file.path).name: file.digest.removeprefix("md5:") for file in hits}

    assert table("mnist") == dict(theirs.MNIST.resources)
    assert table("fashion-mnist") == dict(theirs.FashionMNIST.resources)
    assert table("cifar10") == dict(theirs.CIFAR10.train_list + theirs.CIFAR10.test_list)
    stl10 = dict(theirs.STL10.train_list + theirs.STL10.test_list)
    assert table("stl10").items() <= stl10.items()
    celeba = {name: md5 for _, md5, name in theirs.CelebA.file_list}
    assert table("celeba").items() <= celeba.items()
    archives = {name: data.DOWNLOADS[name][0].file for name in ("cifar10", "stl10")}
    assert archives["cifar10"] == (theirs.CIFAR10.filename, f"md5:{theirs.CIFAR10.tgz_md5}", None)
    assert archives["stl10"] == (theirs.STL10.filename, f"md5:{theirs.STL10.tgz_md5}", None)
    keys = [key for key, _, name in theirs.CelebA.file_list if name in table("celeba")]
    pairs = zip(keys, data.DOWNLOADS["celeba"], strict=True)
    assert all(key in download.url for key, download in pairs)


# The real files


def need(name: str) -> data.Data:
    state = {row.name: row.state for row in data.found()}[name]
    if state == "missing":
        pytest.skip(f"ADV_DATA has no {name}")
    return data.load(name)


@real
def test_the_real_mnist():
    mnist = need("mnist")
    assert [len(p) for p in (mnist.train, mnist.val, mnist.test)] == [50_000, 10_000, 10_000]
    assert mnist.test.y.bincount().tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    pixels = torch.cat([mnist.train.x, mnist.val.x])
    # The widely used mean and standard deviation of the 60,000 training images.
    assert pixels.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert hashlib.sha256(bytes_of(mnist.val).tobytes()).hexdigest()[:16] == "a8d396ee9b2376fb"
    assert mnist.complete


@real
def test_the_real_subset_of_cifar10():
    subset = need("cifar10-subset")
    assert [len(p) for p in (subset.train, subset.val, subset.test)] == [9000, 1000, 2000]
    inexact = [p[~p.exact].y for p in (subset.train, subset.val, subset.test)]
    assert [len(inexact[0]) + len(inexact[1]), len(inexact[2])] == [159, 23]
    assert (torch.cat(inexact) == subset.classes.index("ship")).sum() == 173
    assert not subset.complete


@real
def test_the_real_faces_show_each_person_in_each_part():
    faces = need("faces")
    for part, copies in ((faces.train, 7), (faces.val, 1), (faces.test, 2)):
        assert part.y.bincount().tolist() == [copies] * 40
        assert part.take(40).y.tolist() == list(range(40))
    with np.load(Path(REAL) / "faces.npz") as file:
        assert (bytes_of(faces.val)[:, 0] == file["images"][7::10]).all()


@real
def test_the_real_photographs():
    natural = need("natural")
    with np.load(Path(REAL) / "natural.npz") as file:
        for part, name in ((natural.train, "train"), (natural.val, "val"), (natural.test, "test")):
            assert (
                bytes_of(part).transpose(0, 2, 3, 1) == file["images"][file["split"] == name]
            ).all()
            assert not part.y.any()
