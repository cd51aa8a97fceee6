"""Data sets as tensors: one loader, fixed splits, files checked before they are used.

Files are looked for in the folder that the variable ``ADV_DATA`` names, then in ``cache()``, laid
out as torchvision does. They are only read; ``load(..., download=True)`` writes into ``cache()``.

| name | content | train / val / test |
|---|---|---|
| digits | scikit-learn's 8x8 digits | 1,297 / 100 / 400, stratified |
| patches | 16x16 color patches of scikit-learn's two photographs | 1,480 / 200 / 400, stratified |
| mnist, fashion-mnist | 28x28 gray | 50,000 / 10,000 / 10,000; fixed permutation |
| cifar10 | 32x32 color | 45,000 / 5,000 / 10,000; the last tenth of the training part is ``val`` |
| cifar10-subset | its first images | 9,000 / 1,000 / 2,000; likewise |
| stl10 | 96x96 color, the labeled part | 4,500 / 500 / 8,000, stratified |
| celeba | 64x64 color, labels: Smiling | 162,770 / 19,867 / 19,962, the authors' |
| faces, olivetti | 64x64 gray, labels: person | 280 / 40 / 80: 7 / 1 / 2 images of each person |
| natural | 96x96 color, no labels (all 0) | 200 / 100 / 200, the authors' |
"""

import gzip
import hashlib
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from PIL import Image, ImageOps
from sklearn.datasets import fetch_olivetti_faces, load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ["Data", "File", "Found", "Split", "cache", "found", "load", "names"]


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    ``split[index]`` selects by a slice, a mask or a tensor of indices, and is a ``Split`` again.

    Args:
        x: (N, ...) inputs; of all data sets here images (N, C, H, W), float32 in [0, 1].
        y: (N,) labels.
        exact: (N,) False where a sample is a lossy copy of the original; None where all are exact.

    Raises:
        TypeError: inputs that are not floating point, labels that are not int64, or an ``exact``
            that is not boolean.
        ValueError: other shapes.
    """

    x: Float[Tensor, "N ..."]
    y: Int64[Tensor, " N"]
    exact: Bool[Tensor, " N"] | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.x, Tensor) and isinstance(self.y, Tensor)):
            kinds = f"{type(self.x).__name__} and {type(self.y).__name__}"
            raise TypeError(f"a split takes tensors, not {kinds}")
        if self.x.ndim < 2 or self.y.shape != self.x.shape[:1]:
            raise ValueError(
                f"a split takes inputs (N, ...) and labels (N,), not {tuple(self.x.shape)} "
                f"and {tuple(self.y.shape)}"
            )
        if not self.x.is_floating_point() or self.y.dtype != torch.int64:
            raise TypeError(
                f"a split takes float inputs and int64 labels, not {self.x.dtype} and "
                f"{self.y.dtype}"
            )
        if self.exact is not None and self.exact.shape != self.y.shape:
            raise ValueError(
                f"exact is (N,) as the labels {tuple(self.y.shape)}, not {tuple(self.exact.shape)}"
            )
        if self.exact is not None and self.exact.dtype != torch.bool:
            raise TypeError(f"exact is boolean, not {self.exact.dtype}")

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: slice | Tensor) -> "Split":
        if not isinstance(index, slice | Tensor) or (isinstance(index, Tensor) and not index.ndim):
            raise TypeError(f"a split is indexed by a slice or a 1-d tensor, not {index!r}")
        return Split(*(None if part is None else part[index] for part in self._parts()))  # type: ignore[arg-type]

    def take(self, n: int) -> "Split":
        """The first ``n`` samples; ``ValueError`` where there are fewer."""
        if not _is_integer(n) or not 1 <= n <= len(self):
            raise ValueError(
                f"take({n}) from a split of {len(self)} samples: n is an integer, 1 to {len(self)}"
            )
        return self[:n]

    def to(self, device: torch.device | str) -> "Split":
        """The same samples on ``device``."""
        return Split(*(None if part is None else part.to(device) for part in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.x, self.y, self.exact


def _is_integer(value: object) -> bool:
    """Whether a count is one, NumPy's too: Python's True is an integer as well, and no count."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Data:
    """A data set: three disjoint parts, and what it is.

    Args:
        name: the name it was loaded by.
        train: samples to fit on.
        val: samples to choose settings on.
        test: samples to report on.
        classes: name of each label.
        note: origin, split and whatever a reader of results must know.
        complete: whether this is the whole published data set.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    note: str
    complete: bool = True


class File(NamedTuple):
    """A file a data set needs: path below the data folder, ``"algorithm:hexdigest"``, bytes.

    None stands for what nobody published; a path without a suffix may be a folder of images.
    """

    path: str
    digest: str | None = None
    size: int | None = None


Needed = tuple[tuple[File, ...], ...]


class Download(NamedTuple):
    """An address and the file to store from it."""

    url: str
    file: File


class Found(NamedTuple):
    """One row of ``found()``.

    ``state`` is ``"built in"``, ``"found"``, ``"missing"``, ``"incomplete"`` (some files) or
    ``"damaged"``; ``where`` the folder; ``note`` the content, and the first file at fault.
    """

    name: str
    state: str
    where: str
    note: str


_DIGITS = tuple("0123456789")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION: tuple[str, ...] = ("T-shirt/top", "trouser", "pullover", "dress", "coat")
_FASHION += ("sandal", "shirt", "sneaker", "bag", "ankle boot")
_STL = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_PERSONS = tuple(f"person {i}" for i in range(40))

_CLASSES: dict[str, tuple[str, ...]] = {
    "digits": _DIGITS,
    "patches": ("china", "flower"),
    "mnist": _DIGITS,
    "fashion-mnist": _FASHION,
    "cifar10": _CIFAR,
    "cifar10-subset": _CIFAR,
    "stl10": _STL,
    "celeba": ("not smiling", "smiling"),
    "olivetti": _PERSONS,
    "faces": _PERSONS,
    "natural": ("photograph",),
}

_NOTES = {
    "digits": "8x8 handwritten digits: the test part of UCI's optical digits, as in scikit-learn",
    "patches": "disjoint 16x16 patches of scikit-learn's two photographs, labeled by photograph; "
    "neighbors may lie in different parts",
    "mnist": "MNIST; the validation part is drawn from the 60,000 training images",
    "fashion-mnist": "Fashion-MNIST; the validation part is drawn from the 60,000 training images",
    "cifar10": "CIFAR-10; the validation part is the last tenth of the 50,000 training images",
    "cifar10-subset": "the first 10,000 training and 2,000 test images of CIFAR-10, 182 of them "
    "(173 ships) as JPEG copies, where Split.exact is False",
    "stl10": "the labeled part of STL-10",
    "celeba": "CelebA, aligned; the central 148x148 pixels at 64x64, labeled by the attribute "
    "Smiling",
    "olivetti": "Olivetti faces as scikit-learn fetches them; the same persons in all parts",
    "faces": "Olivetti faces in 8 bits; the same persons in all parts",
    "natural": "centers of the BSDS500 photographs at 96x96; no labels, so y = 0",
}


def _idx_files(folder: str, gzipped: dict[str, tuple[str, int]], raw: list[str | None]) -> Needed:
    """The four files of MNIST and its kin, each as published (gzipped) or unpacked."""
    sizes = (47_040_016, 60_008, 7_840_016, 10_008)
    return tuple(
        (File(f"{folder}/{name}.gz", md5, size), File(f"{folder}/{name}", unpacked, bytes_))
        for (name, (md5, size)), unpacked, bytes_ in zip(gzipped.items(), raw, sizes, strict=True)
    )


def _single(folder: str, *files: tuple[str, str] | tuple[str, str, int]) -> Needed:
    return tuple((File(folder + path, *check),) for path, *check in files)


# What each data set needs, in the order its loader takes it; of several options the first one there
# counts. Digests are those of torchvision's classes; of raw MNIST and the npz files, our own.
FILES: dict[str, Needed] = {
    "mnist": _idx_files(
        "MNIST/raw",
        {
            "train-images-idx3-ubyte": ("md5:f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
            "train-labels-idx1-ubyte": ("md5:d53e105ee54ea40749a09fcbcd1e9432", 28_881),
            "t10k-images-idx3-ubyte": ("md5:9fb629c4189551a2d022fa330f9573f3", 1_648_877),
            "t10k-labels-idx1-ubyte": ("md5:ec29112dd5afa0611ce80d1b7f02629c", 4_542),
        },
        [
            "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ],
    ),
    "fashion-mnist": _idx_files(
        "FashionMNIST/raw",
        {
            "train-images-idx3-ubyte": ("md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d", 26_421_880),
            "train-labels-idx1-ubyte": ("md5:25c81989df183df01b3e8a0aad5dffbe", 29_515),
            "t10k-images-idx3-ubyte": ("md5:bef4ecab320f06d8554ea6380940ec79", 4_422_102),
            "t10k-labels-idx1-ubyte": ("md5:bb300cfdad3c16e7a12a480ee83cd310", 5_148),
        },
        [None] * 4,
    ),
    "cifar10": _single(
        "cifar-10-batches-py/",
        ("data_batch_1", "md5:c99cafc152244af753f735de768cd75f"),
        ("data_batch_2", "md5:d4bba439e000b95fd0a9bffe97cbabec"),
        ("data_batch_3", "md5:54ebc095f3ab1f0389bbae665268c751"),
        ("data_batch_4", "md5:634d18415352ddfa80567beed471001a"),
        ("data_batch_5", "md5:482c414d41f54cd18b22e5b47cb7c3cb"),
        ("test_batch", "md5:40351d587109b95175f43aff81a1287e"),
    ),
    "cifar10-subset": _single(
        "cifar10-subset.npz",
        ("", "sha256:8d7c07571ff2f49fe5e0f9724c9ac916a4680e7ffa26573523f1494498b5d127", 33_913_325),
    ),
    "stl10": _single(
        "stl10_binary/",
        ("train_X.bin", "md5:918c2871b30a85fa023e0c44e0bee87f", 138_240_000),
        ("train_y.bin", "md5:5a34089d4802c674881badbb80307741", 5_000),
        ("test_X.bin", "md5:7f263ba9f9e0b06b93213547f721ac82", 221_184_000),
        ("test_y.bin", "md5:36f9794fa4beb8a2c72628de14fa638e", 8_000),
    ),
    "celeba": (
        (
            File("celeba/img_align_celeba.zip", "md5:00d2c5bc6d35e252742224ab0c1e8fcb"),
            File("celeba/img_align_celeba"),
        ),
        *_single(
            "celeba/",
            ("list_attr_celeba.txt", "md5:75e246fa4810816ffd6ee81facbd244c"),
            ("list_eval_partition.txt", "md5:d32c9cbf5e040fd4025c592c306e6668"),
        ),
    ),
    "olivetti": ((File("olivetti_py3.pkz"),),),
    "faces": _single(
        "faces.npz",
        ("", "sha256:f5495c59eeac98813e1d48f87a9069a1ce278acd9a453b18d7b4e500e4eed12d", 1_412_951),
    ),
    "natural": _single(
        "natural.npz",
        ("", "sha256:8f169adbcefb7e0da911d6d8a2461dff76f01ab102af5b8a134f575f84a6563b", 11_919_746),
    ),
}

# Where to get them, and what to store below the cache; archives are unpacked there.
DOWNLOADS: dict[str, tuple[Download, ...]] = {
    "mnist": tuple(
        Download(f"https://ossci-datasets.s3.amazonaws.com/mnist/{Path(file.path).name}", file)
        for file, _ in FILES["mnist"]
    ),
    "fashion-mnist": tuple(
        Download(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/" + Path(file.path).name,
            file,
        )
        for file, _ in FILES["fashion-mnist"]
    ),
    "cifar10": (
        Download(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            File("cifar-10-python.tar.gz", "md5:c58f30108f718f92721af3b95e74349a"),
        ),
    ),
    "stl10": (
        Download(
            "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
            File("stl10_binary.tar.gz", "md5:91f7769df0f17e558f3565bffb0c7dfb"),
        ),
    ),
    "celeba": tuple(
        Download(f"https://drive.google.com/file/d/{key}/view", options[0])
        for key, options in zip(
            (
                "0B7EVK8r0v71pZjFTYXZWM3FlRnM",
                "0B7EVK8r0v71pblRyaVFSWGxPY0U",
                "0B7EVK8r0v71pY0NSMzRuSXJEVkk",
            ),
            FILES["celeba"],
            strict=True,
        )
    ),
}


def names() -> tuple[str, ...]:
    """The data sets ``load`` knows, those that need no file first."""
    return tuple(_LOADERS)


def cache() -> Path:
    """The user's folder for downloads: ``$XDG_CACHE_HOME/adv/data`` or ``~/.cache/adv/data``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG rule: a relative value is to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "adv" / "data"


def load(name: str, *, download: bool = False, limit: int | None = None) -> Data:
    """Load a data set with its fixed split, every file checked.

    Args:
        name: one of ``names()``.
        download: fetch what is missing or damaged in ``cache()``, with a progress bar. Files in
            ``ADV_DATA`` are never touched.
        limit: keep the first ``limit`` samples of each part, and set ``Data.complete`` to False.
            No more images of ``celeba``, which takes 10 GB as a whole, are read than that.

    Returns:
        The data set, on the CPU, with ``x`` float32 (N, C, H, W) in [0, 1], ``y`` int64 (N,).

    Raises:
        ValueError: unknown name; limit below 1; relative ``ADV_DATA``; truncated or altered file.
        FileNotFoundError: a file, or the folder ``ADV_DATA``, is not there.
        RuntimeError: the download failed.
    """
    if name not in _LOADERS:
        raise ValueError(f"no data set {name!r}; there are {', '.join(names())}")
    if limit is not None and (not _is_integer(limit) or limit < 1):
        raise ValueError(f"limit must be an integer of at least 1, not {limit}")
    if download and not all(map(_settled, FILES.get(name, ()))):
        _download(name)
    # Only celeba is too large to be read whole and cut afterwards.
    settings = {"limit": limit} if name == "celeba" else {}
    train, val, test = (part[:limit] for part in _LOADERS[name](*_files(name), **settings))
    note, complete = _NOTES[name], name != "cifar10-subset"
    if limit is not None:
        note, complete = f"{note}; only the first {limit:,} samples of each part", False
    return Data(name, train, val, test, _CLASSES[name], note, complete)


def found(*, check: bool = False) -> list[Found]:
    """What ``load`` would find: a row for each data set.

    Args:
        check: compute digests too (seconds for large files), not only look at names and sizes.

    Raises:
        ValueError: ``ADV_DATA`` is relative.
        FileNotFoundError: ``ADV_DATA`` names no folder.
    """
    return [_state(name, check) for name in names()]


def _state(name: str, check: bool) -> Found:
    if name not in FILES:
        return Found(name, "built in", "scikit-learn", _NOTES[name])
    paths = [_locate(options) for options in FILES[name]]
    where = ", ".join(sorted({str(root) for root, _ in filter(None, paths)}))
    if not any(paths):
        return Found(name, "missing", "", _NOTES[name])
    for options, hit in zip(FILES[name], paths, strict=True):
        if hit is None:
            return Found(name, "incomplete", where, f"{_NOTES[name]}; no {options[0].path}")
        root, file = hit
        if fault := _fault(root / file.path, file if check else file._replace(digest=None)):
            return Found(name, "damaged", where, f"{_NOTES[name]}; {file.path} {fault}")
    return Found(name, "found", where, _NOTES[name])


def _roots() -> list[Path]:
    """The folders to look in, the first hit counts."""
    value = os.environ.get("ADV_DATA", "")
    if not value:
        return [cache()]
    root = Path(value).expanduser()
    if not root.is_absolute():
        raise ValueError(f"ADV_DATA={value} is relative; set it to the absolute {root.absolute()}")
    if not root.is_dir():
        raise FileNotFoundError(f"ADV_DATA={value} is not a folder; create it or unset ADV_DATA")
    return [root, cache()]


def _locate(options: Iterable[File]) -> tuple[Path, File] | None:
    hits = ((root, file) for root in _roots() for file in options)
    return next(((root, file) for root, file in hits if (root / file.path).exists()), None)


def _settled(options: Iterable[File]) -> bool:
    """Whether a download could not help: there and intact, or a file of the user's own folder."""
    hit = _locate(options)
    return hit is not None and (hit[0] != cache() or not _fault(hit[0] / hit[1].path, hit[1]))


def _files(name: str) -> list[Path]:
    """The checked files of a data set, in the order of its table."""
    paths = []
    for options in FILES.get(name, ()):
        hit = _locate(options)
        if hit is None:
            where = " or ".join(map(str, _roots()))
            raise FileNotFoundError(f"{options[0].path} is not in {where}. {_advice(name)}")
        root, file = hit
        if fault := _fault(root / file.path, file):
            raise ValueError(f"{root / file.path} {fault}. {_remedy(name)}")
        paths.append(root / file.path)
    return paths


def _fault(path: Path, file: File) -> str | None:
    """What is wrong with the file, if anything."""
    if file.digest is not None and not path.is_file():
        return "is a folder, not a file"
    if file.size is not None and (size := path.stat().st_size) != file.size:
        kind = "is truncated" if size < file.size else "is not the published file"
        return f"{kind}: {size:,} bytes instead of {file.size:,}"
    if file.digest is not None:
        algorithm, expected = file.digest.split(":")
        with path.open("rb") as stream:
            actual = hashlib.file_digest(stream, algorithm).hexdigest()
        if actual != expected:
            return f"is truncated or altered: {algorithm} {actual} instead of {expected}"
    return None


def _advice(name: str) -> str:
    if name in DOWNLOADS or name == "olivetti":
        advice = f"`adv data {name} --download`, or in Python load({name!r}, download=True), "
        advice += f"fetches it into {cache()}; or set"
    else:
        advice = "It cannot be downloaded: set"
    advice += " ADV_DATA to the absolute path of a folder that holds it."
    if name == "cifar10":
        advice += " cifar10-subset is another, smaller data set."
    return advice


def _remedy(name: str) -> str:
    if name in DOWNLOADS or name == "olivetti":
        return f"Remove it, then: {_advice(name)}"
    return "Put the published file in its place; it cannot be downloaded."


def _download(name: str) -> None:
    """Fetch what is not intact in the cache; nothing for sets without a public address."""
    if name == "olivetti":
        try:
            fetch_olivetti_faces(data_home=cache())
        except OSError as error:
            raise RuntimeError(f"could not download {name} to {cache()}: {error}") from error
        return
    # Imported here: it takes longer than reading the digits.
    from torchvision.datasets.utils import download_url, extract_archive

    for url, file in DOWNLOADS.get(name, ()):
        target = cache() / file.path
        try:
            download_url(url, target.parent, target.name, str(file.digest).removeprefix("md5:"))
        except (OSError, RuntimeError, ImportError) as error:
            raise RuntimeError(f"could not download {url} to {target}: {error}") from error
        if target.suffixes[-2:] == [".tar", ".gz"]:
            extract_archive(target)


def _split(images: np.ndarray, labels: np.ndarray, exact: np.ndarray | None = None) -> Split:
    """Bytes (N, H, W) or (N, H, W, C) as a ``Split``."""
    x = torch.from_numpy(np.ascontiguousarray(images))
    x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(labels.astype(np.int64))
    return Split(x.float().div_(255), y, None if exact is None else torch.from_numpy(exact))


def _hold_out(split: Split, size: int | float, *, stratify: bool = True) -> tuple[Split, Split]:
    """Divide by a fixed permutation, by number or share; both parts keep the original order."""
    kept, held = train_test_split(
        np.arange(len(split)),
        test_size=size,
        random_state=0,
        stratify=split.y.numpy() if stratify else None,
    )
    return split[torch.from_numpy(np.sort(kept))], split[torch.from_numpy(np.sort(held))]


Parts = tuple[Split, Split, Split]


def _digits() -> Parts:
    bunch = load_digits()
    x = torch.from_numpy(bunch.images[:, None]).float() / 16
    rest, test = _hold_out(Split(x, torch.from_numpy(bunch.target).long()), 400)
    return *_hold_out(rest, 100), test


def _patches(size: int = 16) -> Parts:
    """Disjoint squares from the top left corner on, so that no two parts share a pixel."""
    photographs = np.stack(load_sample_images().images)
    rows, columns = photographs.shape[1] // size, photographs.shape[2] // size
    grid = photographs[:, : rows * size, : columns * size]
    grid = grid.reshape(2, rows, size, columns, size, 3).transpose(1, 3, 0, 2, 4, 5)
    # The photographs alternate, so that the first n patches hold both.
    labels = np.tile([0, 1], rows * columns)
    rest, test = _hold_out(_split(grid.reshape(-1, size, size, 3), labels), 400)
    return *_hold_out(rest, 200), test


def _mnist(*paths: Path) -> Parts:
    images, labels, test_images, test_labels = map(_idx, paths)
    train, val = _hold_out(_split(images, labels), 1 / 6, stratify=False)
    return train, val, _split(test_images, test_labels)


def _idx(path: Path) -> np.ndarray:
    """Bytes of an idx file, gzipped or not: 0, 0, type 8, number of axes, their lengths, values."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    axes = raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    shape = np.frombuffer(raw, ">i4", axes, 4) if 0 < 4 + 4 * axes <= len(raw) else ()
    if not axes or len(raw) != 4 + 4 * axes + math.prod(map(int, shape)):
        raise ValueError(f"{path} is not a complete idx file of bytes; remove it and get it again")
    # A copy: torch warns of memory it may not write.
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def _cifar10(*paths: Path) -> Parts:
    batches = []
    for path in paths:
        with path.open("rb") as stream:
            batches.append(pickle.load(stream, encoding="bytes"))
    images = [batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for batch in batches]
    labels = [np.asarray(batch[b"labels"]) for batch in batches]
    whole = _split(np.concatenate(images[:-1]), np.concatenate(labels[:-1]))
    return *_last_tenth(whole), _split(images[-1], labels[-1])


def _cifar10_subset(path: Path) -> Parts:
    with np.load(path) as file:
        whole, test = (
            _split(file[f"{part}_images"], file[f"{part}_labels"], file[f"{part}_exact"])
            for part in ("train", "test")
        )
    return *_last_tenth(whole), test


def _last_tenth(split: Split) -> tuple[Split, Split]:
    kept = len(split) - len(split) // 10
    return split[:kept], split[kept:]


def _stl10(*paths: Path) -> Parts:
    """Images are stored channel by channel and column by column, labels from 1."""
    bytes_ = [np.fromfile(path, np.uint8) for path in paths]
    images = [part.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1) for part in bytes_[::2]]
    whole, test = (_split(x, y - 1) for x, y in zip(images, bytes_[1::2], strict=True))
    return *_hold_out(whole, 0.1), test


def _faces(path: Path) -> Parts:
    with np.load(path) as file:
        return _by_person(_split(file["images"], file["subject"]))


def _olivetti(path: Path) -> Parts:
    try:
        bunch = fetch_olivetti_faces(data_home=path.parent, download_if_missing=False)
    except Exception as error:  # a damaged pickle may raise anything
        message = f"{path} is truncated or altered ({error}). {_remedy('olivetti')}"
        raise ValueError(message) from error
    x = torch.from_numpy(bunch.images[:, None].copy())
    return _by_person(Split(x, torch.from_numpy(bunch.target).long()))


def _by_person(split: Split) -> Parts:
    """Images 0..6, 7 and 8..9 of each person; persons alternate, so that ``take`` shows many."""
    order = split.y.argsort(stable=True).view(-1, 10).T
    return split[order[:7].flatten()], split[order[7]], split[order[8:].flatten()]


def _natural(path: Path) -> Parts:
    with np.load(path) as file:
        images, split = file["images"], file["split"]
    parts = (images[split == part] for part in ("train", "val", "test"))
    train, val, test = (_split(part, np.zeros(len(part), np.int64)) for part in parts)
    return train, val, test


def _celeba(images: Path, attributes: Path, partition: Path, *, limit: int | None) -> Parts:
    """The central 148x148 pixels of the aligned images, resized to 64x64 (antialiased)."""
    part = pd.read_csv(partition, sep=r"\s+", header=None, index_col=0)[1]
    smiling = pd.read_csv(attributes, sep=r"\s+", skiprows=1)["Smiling"]
    splits = []
    for code in range(3):
        chosen = part.index[part == code][:limit]
        labels = (smiling[chosen] == 1).to_numpy(np.int64)
        splits.append(_split(_celeba_images(images, list(chosen)), labels))
    train, val, test = splits
    return train, val, test


def _celeba_images(source: Path, files: list[str]) -> np.ndarray:
    images = np.empty((len(files), 64, 64, 3), np.uint8)
    with nullcontext() if source.is_dir() else zipfile.ZipFile(source) as archive:
        for i, file in enumerate(tqdm(files, desc="celeba", disable=len(files) < 1000)):
            try:
                stream = (
                    archive.open(f"{source.stem}/{file}") if archive else (source / file).open("rb")
                )
                with stream, Image.open(stream) as image:
                    face = image.convert("RGB").crop((15, 35, 163, 183))
                images[i] = np.asarray(ImageOps.fit(face, (64, 64), Image.Resampling.BILINEAR))
            except (OSError, KeyError) as error:
                message = f"{source} lacks {file}, or it is damaged ({error}). "
                raise ValueError(message + _remedy("celeba")) from error
    return images


_LOADERS: dict[str, Callable[..., Parts]] = {
    "digits": _digits,
    "patches": _patches,
    "mnist": _mnist,
    "fashion-mnist": _mnist,
    "cifar10": _cifar10,
    "cifar10-subset": _cifar10_subset,
    "stl10": _stl10,
    "celeba": _celeba,
    "olivetti": _olivetti,
    "faces": _faces,
    "natural": _natural,
}
