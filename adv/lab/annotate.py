"""People as judges: a page, or a widget, that asks which digit an adversarial image shows.

``adv annotate answers.sqlite`` shows the images of several networks, shuffled, 25 at a time, and
keeps every answer, a digit or '?', as soon as it is given; started again, it goes on where an
annotator was. The page is served by this machine to itself. What is asked never tells which network
an image is from; the table of shares, with Wilson intervals, does (``lab.committee``).

Source: Matyasko (2020), section 4.4, Figure 4.5 and Table 4.2; chapter ``critic``.
"""

import base64
import csv
import errno
import importlib
import io
import json
import math
import sqlite3
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from adv.attacks.common import generator
from adv.lab import committee
from adv.lab.evaluation import CHUNK, perturb, success
from adv.lab.files import replacing

__all__ = ["FORM", "Collection", "Form", "Study", "collect", "serve", "widget"]

FORM = 25  # images of a form
ANSWERS = (*"0123456789", "?")
COLUMNS = ("annotator", "image", "answer", "defense", "label", "target", "time")
SCHEMA = """
create table image (
    id integer primary key, png blob not null, defense text not null,
    label integer not null, target integer not null
);
create table answer (
    image integer not null references image, annotator text not null,
    answer text not null, time text not null, primary key (image, annotator)
);
pragma user_version = 1;
"""


# ----------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Collection:
    """Adversarial images to ask about.

    Args:
        images: (N, C, H, W) in [0, 1], one channel or three.
        y: (N,) the classes before the attack, 0 to 9.
        target: (N,) the classes that the networks take the images for.
        defense: (N,) names of the networks.

    Raises:
        ValueError: shapes, values outside [0, 1], classes that are no digits, or an image whose two
            classes are equal.
    """

    images: Float[Tensor, "N C H W"]
    y: Int[Tensor, " N"]
    target: Int[Tensor, " N"]
    defense: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.images)
        if self.images.ndim != 4 or self.images.shape[1] not in (1, 3) or count == 0:
            raise ValueError(
                f"images are (N, C, H, W) with C = 1 or 3, not {tuple(self.images.shape)}"
            )
        if not (len(self.y) == len(self.target) == len(self.defense) == count):
            raise ValueError(f"{count} images need as many y, target and defense")
        if not (self.images.min() >= 0 and self.images.max() <= 1):
            raise ValueError("images must lie in [0, 1]")
        classes = torch.cat([self.y, self.target])
        if classes.min() < 0 or classes.max() > 9:
            raise ValueError("answers are digits: classes must lie in 0 to 9")
        if bool((self.y == self.target).any()):
            raise ValueError("an image was carried to its own class; leave it out")

    def save(self, path: Path | str) -> None:
        """Write NumPy's ``.npz``, under any name: images (in bytes), y, target, defense."""
        with replacing(path) as draft, draft.open("wb") as file:  # to a name, NumPy adds its own
            np.savez_compressed(
                file,
                images=_bytes(self.images),
                y=self.y.cpu().numpy(),
                target=self.target.cpu().numpy(),
                defense=np.array(self.defense),
            )

    @staticmethod
    def load(path: Path | str) -> "Collection":
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            with Path(path).open("rb") as stream, np.load(stream) as file:
                images, y, target = (torch.from_numpy(file[n]) for n in ("images", "y", "target"))
                defense = tuple(map(str, file["defense"]))
        except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} holds no collection of images ({error})") from error
        if images.dtype != torch.uint8:
            raise ValueError(f"{path} holds no collection: images are {images.dtype}, not uint8")
        return Collection(images.float() / 255, y.long(), target.long(), defense)


def collect(
    networks: Mapping[str, nn.Module],
    x: Float[Tensor, "N C H W"],
    y: Int[Tensor, " N"],
    attack: Callable[..., Tensor],
    **settings: Any,
) -> Collection:
    """Attack the same images on each network and keep what was carried to another class.

    Args:
        networks: by the name of the defense, in evaluation mode.
        x: (N, C, H, W) images in [0, 1].
        y: (N,) their classes; an image that a network gets wrong is left out for it.
        attack: ``(model, x, y, *, ...) -> x_adv``.
        settings: of the attack, or of ``lab.evaluation.perturb``.

    Raises:
        ValueError: no network was fooled, or bad input, as ``perturb`` says.
    """
    parts: list[tuple[Any, ...]] = []
    for name, network in networks.items():
        right = success(network, x, y, targeted=True)
        if not right.any():
            continue
        points = perturb(network, x[right], y[right], attack, **settings)
        fooled = success(network, points, y[right])
        if not fooled.any():
            continue
        with torch.no_grad():
            pieces = points[fooled].split(CHUNK)
            target = torch.cat([network(piece).argmax(dim=1) for piece in pieces])
        parts += [(points[fooled], y[right][fooled], target, (name,) * int(fooled.sum()))]
    if not parts:
        raise ValueError("the attack fooled none of the networks; there is nothing to ask about")
    images, labels, targets = (torch.cat([part[i] for part in parts]) for i in range(3))
    return Collection(images, labels, targets, tuple(chain.from_iterable(p[3] for p in parts)))


def _bytes(images: Tensor) -> np.ndarray:
    return (images * 255).round().byte().cpu().numpy()


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "png")
    return file.getvalue()


# ------------------------------------------------------------------------------------------ store


@dataclass(frozen=True)
class Form:
    """Some images to ask about, and what an annotator has said of them.

    Args:
        number: from 1; of ``forms``.
        forms: how many there are.
        images: PNG files by image.
        answers: the annotator's, by image; those not given are absent.
        answered: of all forms together.
        total: images of all forms together.
    """

    number: int
    forms: int
    images: dict[int, bytes]
    answers: dict[int, str]
    answered: int
    total: int

    @property
    def done(self) -> bool:
        """Whether the annotator has answered for every image of every form."""
        return self.answered == self.total


class Study:
    """Images in a fixed shuffled order and the answers about them, in a SQLite file.

    Several annotators may answer, each for all images; an answer that is given again replaces the
    first. Safe to use from several threads.

    Args:
        path: the file of a study that ``Study.create`` made.

    Raises:
        ValueError: there is no file, or it is no study, or one without images.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no study at {self.path}")
        try:
            with self._opened() as base:
                (self.total,) = base.execute("select count(*) from image").fetchone()
                base.execute("select image, annotator, answer, time from answer limit 1")
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is no study ({error})") from error
        if not self.total:
            raise ValueError(f"{self.path} is a study without images; start another one")

    @staticmethod
    def create(path: Path | str, images: Collection, *, seed: int = 0) -> "Study":
        """Start a study: shuffle the images and write the file.

        Args:
            path: of a file that does not exist.
            images: what to ask about.
            seed: of the order.

        Raises:
            ValueError: the file exists.
        """
        path = Path(path)
        if path.exists():
            raise ValueError(f"{path} exists; open it to go on, or give another name")
        order = torch.randperm(len(images.images), generator=generator(seed)).tolist()
        pixels = _bytes(images.images)
        rows = [
            (number, _png(pixels[i]), images.defense[i], int(images.y[i]), int(images.target[i]))
            for number, i in enumerate(order, start=1)
        ]
        # Under another name until it is whole: what is cut short must not pass for a study.
        with replacing(path) as new, closing(sqlite3.connect(new)) as base, base:
            base.executescript(SCHEMA)
            base.executemany("insert into image values (?, ?, ?, ?, ?)", rows)
        return Study(path)

    @property
    def forms(self) -> int:
        """How many forms there are; the last may be shorter."""
        return math.ceil(self.total / FORM)

    def form(self, annotator: str, number: int | None = None) -> Form:
        """A form, by default the first on which the annotator has left something out.

        Args:
            annotator: who answers.
            number: from 1; where nothing is left out, the default is the last form.

        Raises:
            ValueError: no name, or no such form.
        """
        name = _name(annotator)
        with self._opened() as base:
            query = "select image, answer from answer where annotator = ?"
            answers = dict(base.execute(query, (name,)).fetchall())
            if number is None:
                left = (i for i in range(1, self.total + 1) if i not in answers)
                number = math.ceil(next(left, self.total) / FORM)
            if not 1 <= number <= self.forms:
                raise ValueError(f"no form {number}; there are 1 to {self.forms}")
            first = (number - 1) * FORM
            query = "select id, png from image where id > ? and id <= ? order by id"
            images = dict(base.execute(query, (first, first + FORM)).fetchall())
        own = {image: text for image, text in answers.items() if image in images}
        return Form(number, self.forms, images, own, len(answers), self.total)

    def answer(self, annotator: str, image: int, answer: str) -> None:
        """Keep an answer: a digit or '?'; an empty one takes back what was said.

        Raises:
            ValueError: no name, no such image, or no such answer.
        """
        name = _name(annotator)
        if type(image) is not int or not 1 <= image <= self.total:  # True is no image
            raise ValueError(f"no image {image!r}; there are 1 to {self.total}")
        if answer not in (*ANSWERS, ""):
            raise ValueError(f"an answer is a digit or '?', not {answer!r}")
        with self._opened() as base:
            if not answer:
                query = "delete from answer where image = ? and annotator = ?"
                base.execute(query, (image, name))
                return
            now = datetime.now(UTC).isoformat(timespec="seconds")
            base.execute(
                "insert into answer values (?, ?, ?, ?) on conflict (image, annotator) "
                "do update set answer = excluded.answer, time = excluded.time",
                (image, name, answer, now),
            )

    def answers(self) -> pd.DataFrame:
        """All answers: annotator, image, answer, defense, label, target, time (UTC)."""
        query = (
            f"select {', '.join(COLUMNS)} from answer join image on image.id = answer.image "
            "order by annotator, image"
        )
        with self._opened() as base:
            return pd.DataFrame(base.execute(query).fetchall(), columns=list(COLUMNS))

    def csv(self) -> str:
        """All answers as CSV with a head, for a spreadsheet or another program."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        rows = self.answers().itertuples(index=False)
        writer.writerows([_harmless(value) for value in row] for row in rows)
        return file.getvalue()

    def judgments(self, *, level: float = 0.95) -> dict[str, committee.Judgment]:
        """Change, no change and rest by defense, of those that have answers.

        Args:
            level: coverage of the intervals, for which all answers count as independent.
        """
        return {
            str(name): committee.judge(
                torch.tensor(
                    [committee.UNKNOWN if a == "?" else int(a) for a in part["answer"]],
                ),
                torch.tensor(part["label"].to_list()),
                torch.tensor(part["target"].to_list()),
                level=level,
            )
            for name, part in self.answers().groupby("defense")
        }

    def table(self, *, level: float = 0.95) -> pd.DataFrame:
        """``judgments`` as ``lab.committee.table`` prints them."""
        return committee.table(self.judgments(level=level))

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """A connection of this thread's own; what was written is kept at the end."""
        address = f"{self.path.absolute().as_uri()}?mode=rw"  # where there is no file, make none
        with closing(sqlite3.connect(address, timeout=30, uri=True)) as base, base:
            yield base


def _name(annotator: str) -> str:
    name = annotator.strip() if isinstance(annotator, str) else ""
    if not 1 <= len(name) <= 80:
        raise ValueError("an annotator has a name of 1 to 80 characters")
    return name


def _harmless(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula, quoted."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value


# ----------------------------------------------------------------------------------------- server


def serve(study: Study | Callable[[], Study], *, port: int = 0) -> "Server":
    """A server of the page for this machine's own browsers; ``serve_forever`` runs it.

    Args:
        study: whose images are shown, or a function that makes it, called once the port is held.
        port: of 127.0.0.1; 0 takes a free one. It stands in ``server.server_port``.

    Raises:
        OSError: the port is taken, or not for this user.
    """
    return Server(study, port)


class Server(ThreadingHTTPServer):
    """What ``serve`` returns; ``study`` is the one that it shows."""

    def __init__(self, study: Study | Callable[[], Study], port: int) -> None:
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "is taken" if taken else f"cannot be had ({error.strerror})"
            raise OSError(f"port {port} {why}; port 0 is any that is free") from error
        try:
            self.study = study() if callable(study) else study
        except BaseException:
            self.server_close()
            raise


class _Handler(BaseHTTPRequestHandler):
    """The page, its forms, answers, the table and the CSV file."""

    server: Server

    @property
    def study(self) -> Study:
        return self.server.study

    def do_GET(self) -> None:
        """Answer a question."""
        self._guarded(self._asked)

    def do_POST(self) -> None:
        """Keep an answer."""
        self._guarded(self._answer)

    def _asked(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        pages: dict[str, Callable[[], None]] = {
            "/": lambda: self._send(_page(), "text/html; charset=utf-8"),
            "/form": lambda: self._json(self._form(query)),
            "/results": lambda: self._json(_results(self.study)),
            "/answers.csv": lambda: self._send(self.study.csv(), "text/csv; charset=utf-8"),
        }
        pages.get(address.path, self._nothing)()

    def _nothing(self) -> None:
        self._json({"error": f"nothing at {self.path}"}, 404)

    def _form(self, query: Mapping[str, str]) -> dict[str, Any]:
        number = int(query["number"]) if "number" in query else None
        return _told(self.study.form(query.get("annotator", ""), number))

    def _answer(self) -> None:
        if self.path != "/answer":
            self._nothing()
            return
        # Another site's page may send a form to this address, but not JSON.
        if self.headers.get_content_type() != "application/json":
            raise ValueError("an answer is JSON")
        size = int(self.headers.get("Content-Length", 0))
        if not 0 < size <= 10_000:
            raise ValueError("an answer is short")
        given = json.loads(self.rfile.read(size))
        if not isinstance(given, dict):
            raise ValueError("an answer is an object of annotator, image and answer")
        self.study.answer(given.get("annotator", ""), given.get("image", 0), given.get("answer", 0))
        self._json({"saved": True})

    def _guarded(self, reply: Callable[[], None]) -> None:
        try:
            # A site that points its own name to 127.0.0.1 must not read the answers.
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if host not in ("127.0.0.1", "localhost"):
                self._json({"error": "this page is for the machine itself"}, 403)
                return
            reply()
        except (ValueError, RecursionError) as error:
            self._json({"error": str(error)}, 400)
        except sqlite3.Error as error:
            self._json({"error": f"the file of answers cannot be used now ({error})"}, 503)

    def handle(self) -> None:
        """One request; a browser may close its connection at any time."""
        with suppress(ConnectionError):
            super().handle()

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content), "application/json", status)

    def _send(self, text: str, kind: str, status: int = 200) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        policy += "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing; the page tells what went wrong."""


def _told(form: Form) -> dict[str, Any]:
    """A form as the page reads it; of an image, only its number and its pixels."""
    images = [
        {
            "id": image,
            "src": "data:image/png;base64," + base64.b64encode(png).decode(),
            "answer": form.answers.get(image, ""),
        }
        for image, png in form.images.items()
    ]
    names = ("number", "forms", "answered", "total", "done")
    return {name: getattr(form, name) for name in names} | {"images": images}


def _results(study: Study) -> list[dict[str, Any]]:
    rows = []
    for name, judgment in study.judgments().items():
        shares = {k: str(getattr(judgment, k)) for k in ("change", "no_change", "rest")}
        rows.append({"defense": name, "answers": judgment.answers} | shares)
    return rows


def _page() -> str:
    return Path(__file__).with_name("annotate.html").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------- widget


def widget(study: Study, annotator: str) -> Any:
    """The same forms inside a notebook; needs ``ipywidgets``, which the book's extra brings.

    Args:
        study: whose images are shown; answers are kept there as they are given.
        annotator: who answers.

    Returns:
        An ``ipywidgets.VBox`` to display, with a heading, the images and a field for each, a button
        for the next form, and a line that says what is missing.

    Raises:
        ImportError: without ipywidgets.
        ValueError: no name.
    """
    kit = importlib.import_module("ipywidgets")
    heading, message = kit.HTML(), kit.HTML()
    grid = kit.GridBox(
        layout=kit.Layout(grid_template_columns="repeat(auto-fill, minmax(110px, 1fr))")
    )
    onward = kit.Button(description="Next images")

    def keep(change: Mapping[str, Any], image: int) -> None:
        field, text = change["owner"], change["new"].strip()
        if text in (*ANSWERS, ""):
            study.answer(annotator, image, text)
            message.value = ""
        else:
            field.value = change["old"]
            message.value = "An answer is one digit, or ?"

    def field(image: int, png: bytes, answer: str) -> Any:
        picture = kit.Image(value=png, format="png", width="96", height="96")
        text = kit.Text(
            value=answer,
            description=f"{image}:",  # what a screen reader calls the field
            placeholder="0-9, ?",
            style={"description_width": "2.2em"},
            layout=kit.Layout(width="104px"),
        )
        text.observe(partial(keep, image=image), names="value")
        return kit.VBox([picture, text])

    def show(form: Form) -> None:
        heading.value = f"Form {form.number} of {form.forms}: which digit is this?"
        grid.children = [field(i, png, form.answers.get(i, "")) for i, png in form.images.items()]

    def following(_: Any) -> None:
        shown = study.form(annotator)
        show(shown)
        left = shown.total - shown.answered
        message.value = "All answered. Thank you." if shown.done else f"{left} images to go."

    onward.on_click(following)
    show(study.form(annotator))
    return kit.VBox([heading, grid, onward, message])
