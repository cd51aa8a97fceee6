"""The annotation page, end to end in a real browser, and the study behind it.

Chromium comes from the system, from ``$CHROMIUM``, or from ``playwright install chromium``.
"""

import csv
import errno
import http.client
import io
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from scipy.stats import binomtest
from typer.testing import CliRunner

from adv.__main__ import JUDGED, app
from adv.attacks.gradient import fgsm
from adv.lab import annotate, data, zoo
from adv.lab.annotate import Collection, Study

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def collection(count=60, channels=1):
    """Noise with known classes: of defense ``b`` twice as many as of ``a``."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, 8, 8, generator=g)
    y = torch.arange(count) % 10
    return Collection(images, y, (y + 3) % 10, tuple("abb"[i % 3] for i in range(count)))


@pytest.fixture
def study(tmp_path):
    return Study.create(tmp_path / "answers.sqlite", collection())


def truth(study):
    """What the file holds of each image: (png, defense, label, target)."""
    with sqlite3.connect(study.path) as base:
        rows = base.execute("select id, png, defense, label, target from image").fetchall()
    return {row[0]: row[1:] for row in rows}


# ------------------------------------------------------------------------------------------ store


def test_images_are_shuffled_and_keep_their_classes(study, tmp_path):
    given, kept = collection(), truth(study)
    bytes_ = (given.images[:, 0] * 255).round().byte().numpy()
    order = []
    for png, defense, label, target in kept.values():
        image = np.asarray(Image.open(io.BytesIO(png)))
        (index,) = np.flatnonzero((bytes_ == image).all(axis=(1, 2)))
        assert (defense, label, target) == (
            given.defense[index],
            given.y[index],
            given.target[index],
        )
        order.append(index)
    assert sorted(order) == list(range(60))
    assert order != sorted(order)
    other = Study.create(tmp_path / "other.sqlite", given, seed=1)
    assert truth(other) != kept
    assert truth(Study.create(tmp_path / "same.sqlite", given)) == kept


def test_forms_and_resuming(study):
    form = study.form("ann")
    assert (form.number, form.forms, list(form.images)) == (1, 3, list(range(1, 26)))
    assert list(study.form("ann", 3).images) == list(range(51, 61))
    for image in range(1, 26):
        study.answer("ann", image, "7")
    study.answer("ann", 30, "?")
    form = Study(study.path).form("ann")  # as after a restart
    assert (form.number, form.answered, form.answers) == (2, 26, {30: "?"})
    assert study.form("bob").answered == 0
    for image in range(26, 61):
        study.answer("ann", image, "1")
    assert study.form("ann").done
    assert study.form("ann").number == 3
    study.answer("ann", 4, "")
    form = study.form("ann")
    assert (form.number, form.done, 4 in form.answers) == (1, False, False)


def test_answers_are_replaced_counted_and_exported(study):
    kept = truth(study)
    answers = {1: "?", 2: str(kept[2][2]), 3: str(kept[3][3]), 4: str((kept[4][2] + 1) % 10)}
    study.answer("ann", 1, "5")
    for image, answer in answers.items():
        study.answer("ann", image, answer)
    study.answer("=1+1", 3, "0")
    rows = list(csv.DictReader(io.StringIO(study.csv())))
    assert len(rows) == 5
    mine = {int(r["image"]): r for r in rows if r["annotator"] == "ann"}
    assert {i: r["answer"] for i, r in mine.items()} == answers
    assert {r["annotator"] for r in rows} == {"ann", "'=1+1"}  # no formula for a spreadsheet
    for image, row in mine.items():
        assert (row["defense"], int(row["label"]), int(row["target"])) == kept[image][1:]
        assert row["time"].endswith("+00:00")


def test_the_table_counts_by_defense_with_wilsons_interval(study):
    kept, rng = truth(study), np.random.default_rng(0)
    counts = {"a": [0, 0, 0], "b": [0, 0, 0]}
    for image, (_, defense, label, target) in kept.items():
        kind = int(rng.integers(3))
        study.answer("ann", image, [str(target), str(label), "?"][kind])
        counts[defense][kind] += 1
    table = study.table()
    for name, row in counts.items():
        assert table.loc[name, "answers"] == sum(row)
        for kind, count in zip(("change", "no_change", "rest"), row, strict=True):
            want = binomtest(count, sum(row)).proportion_ci(method="wilson")
            ends = table.loc[name, [kind, f"{kind} low", f"{kind} high"]]
            share = 100 * count / sum(row)
            assert ends.tolist() == pytest.approx([share, 100 * want.low, 100 * want.high])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 1, "3"), "name"),
        (("a" * 81, 1, "3"), "name"),
        ((None, 1, "3"), "name"),
        (("ann", 0, "3"), "no image 0"),
        (("ann", 61, "3"), "no image 61"),
        (("ann", "1", "3"), "no image '1'"),
        (("ann", True, "3"), "no image True"),
        (("ann", 1, "10"), "a digit"),
        (("ann", 1, "x"), "a digit"),
        (("ann", 1, None), "a digit"),
    ],
)
def test_impossible_answers_are_refused(study, arguments, message):
    with pytest.raises(ValueError, match=message):
        study.answer(*arguments)
    assert study.answers().empty


def test_impossible_studies_are_refused(study, tmp_path):
    with pytest.raises(ValueError, match="exists"):
        Study.create(study.path, collection())
    with pytest.raises(ValueError, match="no form 4"):
        study.form("ann", 4)
    with pytest.raises(ValueError, match="no study at"):
        Study(tmp_path / "none.sqlite")
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(ValueError, match="is no study"):
        Study(tmp_path / "text")
    with closing(sqlite3.connect(tmp_path / "empty.sqlite")) as base:
        base.executescript(annotate.SCHEMA)
    with pytest.raises(ValueError, match="without images"):
        Study(tmp_path / "empty.sqlite")


def test_a_study_cut_short_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(annotate, "SCHEMA", annotate.SCHEMA + "drop table image;")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        Study.create(tmp_path / "answers.sqlite", collection())
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert Study.create(tmp_path / "answers.sqlite", collection()).total == 60
    assert [path.name for path in tmp_path.iterdir()] == ["answers.sqlite"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, "C, H, W"),
        ({"images": torch.zeros(3, 2, 8, 8)}, "C, H, W"),
        ({"images": torch.full((3, 1, 8, 8), 1.5)}, "0, 1"),
        ({"images": torch.full((3, 1, 8, 8), torch.nan)}, "0, 1"),
        ({"y": torch.tensor([0, 1])}, "as many"),
        ({"y": torch.tensor([0, 1, 10])}, "digits"),
        ({"target": torch.tensor([1, 2, 2])}, "own class"),
    ],
)
def test_impossible_collections_are_refused(change, message):
    given = {
        "images": torch.zeros(3, 1, 8, 8),
        "y": torch.tensor([0, 1, 2]),
        "target": torch.tensor([1, 2, 3]),
        "defense": ("a", "b", "c"),
    }
    with pytest.raises(ValueError, match=message):
        Collection(**given | change)


def test_collections_go_through_files(tmp_path):
    given = collection(5, channels=3)
    given.save(tmp_path / "some")
    got = Collection.load(tmp_path / "some")
    assert [path.name for path in tmp_path.iterdir()] == ["some"]
    assert (got.images - given.images).abs().max() <= 0.5 / 255 + 1e-6
    assert (got.y.tolist(), got.target.tolist()) == (given.y.tolist(), given.target.tolist())
    assert got.defense == given.defense
    assert Study.create(tmp_path / "color.sqlite", got).total == 5
    (tmp_path / "bad.npz").write_bytes(b"hello")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    (tmp_path / "empty.npz").touch()
    fields = {"y": given.y, "target": given.target, "defense": given.defense}
    np.savez(tmp_path / "floats.npz", images=given.images, **fields)
    for name in ("bad.npz", "other.npz", "empty.npz", "floats.npz"):
        with pytest.raises(ValueError, match="holds no collection"):
            Collection.load(tmp_path / name)


def test_collect_keeps_what_was_carried_to_another_class():
    test = data.load("digits").test.take(60)
    networks = {name: zoo.load(f"digits/{name}") for name in ("cnn", "cnn-at")}
    got = annotate.collect(networks, test.x, test.y, fgsm, eps=0.15)
    for name, network in networks.items():
        own = torch.tensor([d == name for d in got.defense])
        before, after = network(test.x).argmax(1), network(fgsm(network, test.x, test.y, eps=0.15))
        fooled = (before == test.y) & (after.argmax(1) != test.y)
        assert own.sum() == fooled.sum() > 0
        assert got.y[own].equal(test.y[fooled])
        assert got.target[own].equal(network(got.images[own]).argmax(1))
    with pytest.raises(ValueError, match="fooled none"):
        annotate.collect(networks, test.x, test.y, fgsm, eps=0.0)


def test_collect_leaves_out_who_was_not_fooled():
    """An MLP does not take an empty batch."""
    test = data.load("digits").test.take(40)
    networks = {name: zoo.load(f"digits/{name}") for name in ("cnn", "mlp")}

    def only_cnn(model, x, y, **given):
        return fgsm(model, x, y, **given) if model is networks["cnn"] else x

    got = annotate.collect(networks, test.x, test.y, only_cnn, eps=0.15, norm="linf")
    assert set(got.defense) == {"cnn"}
    with pytest.raises(ValueError, match="fooled none"):
        annotate.collect({"mlp": networks["mlp"]}, test.x, test.y, fgsm, eps=0.0)


# ----------------------------------------------------------------------------------------- server


@pytest.fixture
def address(study):
    server = annotate.serve(study)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def reply(address, path, body=None, **headers):
    kind = {"Content-Type": "application/json"} if body is not None else {}
    request = urllib.request.Request(address + path, data=body, headers=kind | headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_form_tells_nothing_but_the_pixels(address, study):
    status, text = reply(address, "form?annotator=ann&number=2")
    form = json.loads(text)
    assert status == 200
    assert [one["id"] for one in form["images"]] == list(range(26, 51))
    assert {name for one in form["images"] for name in one} == {"id", "src", "answer"}
    assert form["images"][0]["src"].startswith("data:image/png;base64,")


def test_strangers_and_nonsense_are_turned_away(address, study):
    good = json.dumps({"annotator": "ann", "image": 1, "answer": "3"}).encode()
    assert reply(address, "answer", good, Host="evil.example")[0] == 403
    assert reply(address, "results", Host="evil.example:80")[0] == 403
    assert reply(address, "answer", good, **{"Content-Type": "text/plain"})[0] == 400
    assert reply(address, "answer", b"[1]")[0] == 400
    assert reply(address, "answer", b"{not json")[0] == 400
    assert reply(address, "answer", b"{}")[0] == 400
    assert reply(address, "answer", b" " * 20_000)[0] == 400
    assert reply(address, "elsewhere")[0] == 404
    assert reply(address, "elsewhere", good)[0] == 404
    for path in ("form", "form?annotator=", "form?annotator=ann&number=9", "form?number=x"):
        assert reply(address, path)[0] == 400
    deep = b"[" * 9_000
    true = json.dumps({"annotator": "ann", "image": True, "answer": "3"}).encode()
    for status, text in (
        reply(address, "form", Host="["),
        reply(address, "answer", good, Host="["),
        reply(address, "answer", deep),
        reply(address, "answer", true),
    ):
        assert status == 400
        assert json.loads(text)["error"]
    with closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)) as connection:
        connection.putrequest("GET", "http://[/", skip_host=True)
        connection.putheader("Host", "localhost")
        connection.endheaders()
        assert connection.getresponse().status == 400
    assert study.answers().empty
    assert reply(address, "answer", good) == (200, '{"saved": true}')
    assert len(study.answers()) == 1


def test_a_file_that_fails_is_told_to_the_page(address, study, monkeypatch):
    good = json.dumps({"annotator": "ann", "image": 1, "answer": "3"}).encode()
    with sqlite3.connect(study.path) as base:
        base.execute("alter table answer rename to elsewhere")
    for path, body in (("answer", good), ("form?annotator=ann", None), ("results", None)):
        status, text = reply(address, path, body)
        assert status == 503
        assert "no such table" in json.loads(text)["error"]


def test_a_file_that_was_deleted_is_not_made_again(address, study):
    study.path.unlink()
    good = json.dumps({"annotator": "ann", "image": 1, "answer": "3"}).encode()
    status, text = reply(address, "answer", good)
    assert status == 503
    assert "unable to open" in json.loads(text)["error"]
    assert not study.path.exists()


def test_a_file_may_have_any_name(tmp_path):
    study = Study.create(tmp_path / "a #1?mode=ro%20é.sqlite", collection(5))
    study.answer("ann", 1, "3")
    assert len(Study(study.path).answers()) == 1


def test_the_page_is_for_this_machine_alone(study):
    with annotate.serve(study) as server:
        assert server.server_address[0] == "127.0.0.1"


# ---------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.fail("no Chromium found; install one, or set CHROMIUM to its path")
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page; at the end nothing may have gone wrong in it."""
    problems, contexts = [], []

    def opened(size=DESK, scheme="light"):
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: r.url.startswith((address, "data:")) or problems.append(r.url))
        page.goto(address)
        return page

    opened.problems = problems
    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def begin(page, name="ann"):
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Form")


def answered(study, count):
    """Wait until the file holds so many answers."""
    for _ in range(100):
        if len(study.answers()) == count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{len(study.answers())} answers, not {count}")


def test_all_forms_by_keyboard_alone(visit, study):
    page, kept = visit(), truth(study)
    begin(page)
    said = {image: "?" if image % 7 == 0 else str(kept[image][3]) for image in kept}
    for form in range(3):
        expect(page.get_by_role("heading", level=1)).to_contain_text(f"Form {form + 1} of 3")
        assert page.locator("#grid img").count() == (25, 25, 10)[form]
        loaded = "() => [...document.images].every(i => i.complete && i.naturalWidth === 8)"
        page.wait_for_function(loaded)
        for image in range(25 * form + 1, min(25 * form + 25, 60) + 1):
            page.keyboard.type(said[image])
        expect(page.get_by_role("status")).to_contain_text("All answers are kept.")
        expect(page.get_by_role("button", name="Next images")).to_be_focused()
        page.keyboard.press("Enter")
    expect(page.get_by_text("Thank you")).to_be_visible()
    frame = study.answers()
    assert dict(zip(frame["image"], frame["answer"], strict=True)) == said
    cells = page.locator("#rows tr").first.locator("th, td").all_inner_texts()
    want = study.judgments()["a"]
    assert cells[:3] == ["a", "20", str(want.change)]
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    assert Path(download.value.path()).read_text() == study.csv()


def test_what_is_left_out_is_asked_for_and_a_return_goes_on(visit, study):
    page = visit()
    begin(page)
    page.keyboard.type("12x3")  # a letter is refused, and the field waits
    answered(study, 3)
    expect(page.get_by_text("ann: 3 of 60 images answered so far.")).to_be_visible()
    page.get_by_role("button", name="Next images").click()
    expect(page.get_by_role("status")).to_have_text("22 images have no answer yet.")
    expect(page.get_by_label("Digit in image 4,")).to_be_focused()
    again = visit()  # another browser, the same name
    begin(again)
    expect(again.get_by_label("Digit in image 3,")).to_have_value("3")
    expect(again.get_by_label("Digit in image 4,")).to_be_focused()
    again.keyboard.press("Backspace")  # back to 3, which is selected
    again.keyboard.type("8")
    again.get_by_label("Digit in image 1,").fill("")
    answered(study, 2)
    assert study.form("ann").answers == {2: "2", 3: "8"}
    begin(visit(), "bob")
    assert study.form("bob").answered == 0


def test_arrows_move_and_buttons_answer_on_a_phone(visit, study):
    page = visit(PHONE)
    begin(page)
    for key, image in [("ArrowDown", 4), ("ArrowRight", 5), ("ArrowUp", 2), ("ArrowLeft", 1)]:
        page.keyboard.press(key)
        expect(page.get_by_label(f"Digit in image {image},")).to_be_focused()
    page.get_by_role("button", name="Cannot tell image 1", exact=True).click()
    answered(study, 1)
    assert study.form("ann").answers == {1: "?"}
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    small = page.evaluate(
        "[...document.querySelectorAll('#form button, #form input')]"
        ".filter(e => e.checkVisibility()).map(e => e.getBoundingClientRect())"
        ".filter(r => r.width < 44 || r.height < 44).length"
    )
    assert small == 0, "targets that a finger misses"
    page.get_by_role("link", name="Results so far").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("What people saw")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.get_by_role("link", name="Back to the images").click()
    expect(page.get_by_label("Digit in image 1,")).to_have_value("?")


def luminance(color):
    parts = [int(v) / 255 for v in re.findall(r"\d+", color)[:3]]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_and_everything_has_a_name(visit, scheme):
    page = visit(DESK, scheme)
    begin(page)
    page.keyboard.type("1")
    colors = page.evaluate(
        """() => ['body', '.soft', '#next', '#status', 'a', '.answered input'].map(s => {
            let e = document.querySelector('#form ' + s) || document.querySelector(s);
            const color = getComputedStyle(e).color;
            while (getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;
            return [s, color, getComputedStyle(e).backgroundColor];
        })"""
    )
    for selector, text, back in colors:
        low, high = sorted([luminance(text), luminance(back)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector
    assert (luminance(colors[0][2]) > 0.5) == (scheme == "light")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, button, img')].filter(e => !(e.ariaLabel || e.alt ||"
        " e.textContent.trim() || (e.labels && e.labels.length))).length"
    )
    assert unnamed == 0
    assert page.locator("html").get_attribute("lang") == "en"


def test_what_could_not_be_kept_is_said_and_kept_later(visit, study):
    page = visit()
    begin(page)
    page.route("**/answer", lambda route: route.fulfill(status=400, json={"error": "full disk"}))
    field = page.get_by_label("Digit in image 1,")
    expect(field).to_be_focused()
    field.press("5")
    expect(page.get_by_role("status")).to_contain_text("Not kept: full disk")
    visit.problems.clear()  # the browser reports the refusal, too
    page.unroute("**/answer")
    page.keyboard.type("6" * 24)
    answered(study, 24)
    page.get_by_role("button", name="Next images").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Form 2 of 3")
    assert study.form("ann", 1).answers == {1: "5"} | dict.fromkeys(range(2, 26), "6")


def test_of_two_answers_in_haste_the_last_stays(visit, study):
    page, held, on = visit(), [], []
    begin(page)
    page.route("**/answer", lambda route: route.continue_() if on else held.append(route))
    field = page.get_by_label("Digit in image 1,")
    field.press("3")
    field.press("7")
    page.get_by_label("Digit in image 2,").press("4")
    for _ in range(20):
        page.wait_for_timeout(10)
    sent = [route.request.post_data_json for route in held]
    assert [(one["image"], one["answer"]) for one in sent] == [(1, "3"), (2, "4")]
    assert "All answers" not in page.get_by_role("status").inner_text()
    on.append(True)
    for route in held:
        route.continue_()
    expect(page.get_by_role("status")).to_contain_text("All answers are kept.")
    assert study.form("ann", 1).answers == {1: "7", 2: "4"}


# ----------------------------------------------------------------------------------------- widget


def test_the_widget_asks_and_keeps(study):
    box = annotate.widget(study, "ann")
    heading, grid, onward, message = box.children
    assert "Form 1 of 3" in heading.value
    assert len(grid.children) == 25
    picture, text = grid.children[2].children
    assert picture.value == truth(study)[3][0]
    text.value = "x"
    assert (text.value, study.answers().empty) == ("", True)
    assert "one digit" in message.value
    text.value = "4"
    assert study.form("ann").answers == {3: "4"}
    text.value = "4x"
    assert (text.value, study.form("ann").answers) == ("4", {3: "4"})
    assert "one digit" in message.value
    onward.click()
    assert "59 images to go" in message.value
    for cell in grid.children:
        cell.children[1].value = "?"
    onward.click()
    assert "Form 2 of 3" in heading.value
    for image in range(26, 61):
        study.answer("ann", image, "1")
    onward.click()
    assert "Thank you" in message.value
    again = annotate.widget(study, "ann").children[1].children
    assert [cell.children[1].value for cell in again] == ["1"] * 10


# ----------------------------------------------------------------------------------- command line


def run(*arguments):
    return CliRunner().invoke(app, ["annotate", *map(str, arguments)])


def test_the_command_makes_exports_and_shows(tmp_path):
    store, images = tmp_path / "answers.sqlite", tmp_path / "some.npz"
    assert run(store, "--table").exit_code == 1
    collection(30).save(images)
    command = [sys.executable, "-m", "adv", "annotate", str(store), "--images", str(images)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--no-browser"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert "30 images in 2 forms" in line
        address = re.search(r"http://\S+/", line).group()
        body = json.dumps({"annotator": "ann", "image": 1, "answer": "?"}).encode()
        assert reply(address, "answer", body)[0] == 200
        assert "Which digit" in reply(address, "")[1]
    finally:
        process.terminate()
        process.communicate(timeout=20)
    assert "100.0" in run(store, "--table").stdout
    assert run(store, "--csv", tmp_path / "answers.csv").exit_code == 0
    assert (tmp_path / "answers.csv").read_text() == Study(store).csv()
    assert run(store, "--images", images).exit_code == 2
    assert run(tmp_path / "b", "--images", images, "--network", "digits/cnn").exit_code == 2
    assert run(tmp_path / "b", "--network", "digits/none").exit_code == 2
    mixed = run(tmp_path / "b", "--network", "digits/cnn", "--network", "mnist/fcnn")
    assert "one data set" in " ".join(mixed.stderr.replace("│", " ").split())


def test_the_command_attacks_networks_with_their_own_confidence(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(annotate, "serve", lambda make, port: Served(make()))
    monkeypatch.setattr("webbrowser.open", started.append)
    done = run(tmp_path / "new.sqlite", "--samples", 12, "--network", "digits/cnn")
    assert done.exit_code == 0, done.output
    assert started == ["http://127.0.0.1:7/"]
    study = Study(tmp_path / "new.sqlite")
    network, test = zoo.load("digits/cnn"), data.load("digits").test.take(12)
    images = torch.stack(
        [
            torch.from_numpy(np.asarray(Image.open(io.BytesIO(row[0]))).copy())[None] / 255
            for row in truth(study).values()
        ]
    )
    target = torch.tensor([row[3] for row in truth(study).values()])
    reached = network(images).softmax(1).gather(1, target[:, None])[:, 0]
    clean = network(test.x).softmax(1).amax(1)
    assert len(images) >= 10
    assert reached.mean() > clean.mean() - 0.05


def test_the_networks_judged_by_default_are_in_the_zoo_and_alike():
    entries = [zoo.entry(name) for name in JUDGED]
    assert len({(entry.data, str(entry.model)) for entry in entries}) == 1
    told = "".join(run("--help").stdout.split())
    assert all(name in told for name in JUDGED)


def test_a_port_that_is_taken_is_told_before_anything_is_made(tmp_path, monkeypatch):
    store, images = tmp_path / "answers.sqlite", tmp_path / "some.npz"
    collection(30).save(images)
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        taken = run(store, "--images", images, "--port", port, "--no-browser")
        assert taken.exit_code == 1
        assert taken.stderr == f"adv: port {port} is taken; port 0 is any that is free\n"
        assert not store.exists()
    monkeypatch.setattr(annotate.Server, "serve_forever", Served.serve_forever)
    free = run(store, "--images", images, "--port", 0, "--no-browser")
    assert free.exit_code == 0, free.output
    assert Study(store).total == 30


def test_a_port_that_is_not_allowed_says_so(study, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("http.server.ThreadingHTTPServer.server_bind", refuse)
    with pytest.raises(OSError, match=r"port 80 cannot be had \(Permission denied\); port 0"):
        annotate.serve(study, port=80)


def test_a_study_that_cannot_be_made_frees_the_port():
    def fail():
        raise ValueError("no images")

    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
    for _ in range(2):
        with pytest.raises(ValueError, match="no images"):
            annotate.serve(fail, port=port)


class Served:
    """A server that is asked to stop at once."""

    server_port = 7

    def __init__(self, study):
        self.study = study

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def serve_forever(self):
        raise KeyboardInterrupt
