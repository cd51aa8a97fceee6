"""The built site in a real browser: every page, on a desk and on a phone, without the network.

The site is built from the stored notebooks, so nothing is executed. Chromium comes from the system
(``chromium``, ``google-chrome``), from ``$CHROMIUM``, or from ``playwright install chromium``.
"""

import functools
import os
import re
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import book  # noqa: E402

PAGES = [f"book/{p.stem}.html" for p in book.toc_files(ROOT)]
CHAPTERS = [f"book/{p.stem}.html" for p in book.chapters(ROOT)]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


class QuietHandler(SimpleHTTPRequestHandler):
    """A file server that keeps its log to itself."""

    def log_message(self, *args):
        pass


def serve(folder: Path):
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="session")
def site():
    """The address of the site, built from the stored outputs."""
    server, address = serve(book.site(ROOT, ROOT / "_build" / "stored"))
    yield address
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.fail(
                "no Chromium found: install your system's chromium package, or run "
                "`.venv/bin/playwright install chromium`, or set CHROMIUM to its path"
            )
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """An open page with what went wrong while it loaded."""

    def __init__(self, browser, site: str, path: str, size: dict, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("console", self.listen)
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("requestfailed", lambda r: self.problems.append(f"failed: {r.url}"))
        self.page.on("response", self.check)
        self.page.route("**/*", functools.partial(self.only, site))
        self.page.goto(site + path)
        self.page.wait_for_load_state("load")
        self.page.wait_for_function(
            "() => !window.MathJax || !MathJax.startup || !MathJax.startup.promise"
            " || MathJax.startup.promise.then(() => true)"
        )

    def only(self, site, route):
        url = route.request.url
        if url.startswith((site, "data:", "blob:")):
            route.continue_()
        else:
            self.problems.append(f"asks the network for {url}")
            route.abort()

    def listen(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(f"console {message.type}: {message.text}")

    def check(self, response):
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("path", PAGES)
def test_page(site, browser, path, size):
    with Visit(browser, site, path, size) as visit:
        page = visit.page
        assert visit.problems == []
        assert page.locator("article h1").first.inner_text()

        broken = page.evaluate(
            "() => [...document.images].filter(i => !(i.complete && i.naturalWidth))"
            ".map(i => i.src)"
        )
        assert broken == [], "missing images"
        silent = page.evaluate(
            "() => [...document.querySelectorAll('article img')]"
            ".filter(i => !i.alt || /^(_images|\\.\\.)/.test(i.alt)).map(i => i.src)"
        )
        assert silent == [], "images without alt text"

        # Formulas: MathJax has typeset each, none as an error, and no raw TeX is left in the text.
        raw = page.evaluate(
            "() => [...document.querySelectorAll('.math')]"
            ".filter(m => !m.querySelector('mjx-container')).map(m => m.textContent)"
        )
        assert raw == [], "formulas that were not typeset"
        wrong = page.evaluate(
            "() => [...document.querySelectorAll('mjx-merror')].map(m => m.textContent)"
        )
        assert wrong == [], "formulas with errors"
        prose = page.evaluate(
            """() => {
                const copy = document.querySelector('article').cloneNode(true);
                copy.querySelectorAll('pre, code, dt.sig, mjx-container, script')
                    .forEach(e => e.remove());
                return copy.textContent;
            }"""
        )
        assert not re.search(r"\$[^$\n]+\$|\\(frac|lambda|delta|mathbb)\b", prose)
        assert not re.search(r"\{(ref|glue|cite|doc|prf|eq|numref)[^}]*\}`", prose)

        if size is DESK:
            cut = page.evaluate(
                "() => [...document.querySelectorAll('div.cell pre, div.math')]"
                ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
            )
            assert cut == [], "code, output or formulas wider than their column"
        wide = page.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= size["width"], "the page is wider than the screen"


@pytest.mark.parametrize("path", PAGES)
def test_internal_links(site, browser, path, tmp_path_factory):
    html = ROOT / "_build/stored/_build/html"
    with Visit(browser, site, path, DESK) as visit:
        links = visit.page.evaluate(
            "() => [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"
        )
    for link in set(links):
        target = urlsplit(urljoin(site + path, link))
        if not urljoin(site + path, link).startswith(site) or "genindex" in link:
            continue
        file = html / (target.path.lstrip("/") or "index.html")
        assert file.exists(), f"broken link: {link}"
        if target.fragment and file.suffix == ".html":
            assert f'id="{target.fragment}"' in file.read_text(), f"broken anchor: {link}"


@pytest.mark.parametrize("path", CHAPTERS)
def test_the_executed_notebook_can_be_downloaded(site, browser, path):
    with Visit(browser, site, path, DESK) as visit:
        link = visit.page.locator("a[href$='.ipynb']").first
        url = urljoin(site + path, link.get_attribute("href"))
        notebook = visit.context.request.get(url).json()
    assert any(c.get("outputs") for c in notebook["cells"])


def test_dark_mode_follows_the_reader(site, browser):
    def background(scheme):
        with Visit(browser, site, CHAPTERS[0], DESK, scheme) as visit:
            assert visit.problems == []
            return visit.page.evaluate("() => getComputedStyle(document.body).backgroundColor")

    light, dark = (sum(map(int, re.findall(r"\d+", background(s))[:3])) for s in ("light", "dark"))
    assert light > 600
    assert dark < 200


def test_search_finds_a_chapter(site, browser):
    with Visit(browser, site, "search.html?q=projection", DESK) as visit:
        results = visit.page.locator("#search-results a")
        results.first.wait_for(timeout=20_000)
        assert any("geometry" in (a.get_attribute("href") or "") for a in results.all())


def test_theorems_link_both_ways(site, browser):
    with Visit(browser, site, "book/geometry.html", DESK) as visit:
        back = visit.page.locator(".theorem-uses a").first
        assert back.count()
        theorem = back.evaluate("a => a.closest('.proof').id")
        place = urlsplit(urljoin(site + "book/geometry.html", back.get_attribute("href")))
    with Visit(browser, site, f"{place.path[1:]}#{place.fragment}", DESK) as visit:
        assert visit.page.locator(f"article a[href*='#{theorem}']").count()


def test_launch_buttons_lead_to_the_stored_notebooks(browser, tmp_path):
    """With a sample address: the links Colab and Binder would get."""
    config = tmp_path / "_config.yml"
    text = (ROOT / "_config.yml").read_text()
    text = text.replace('url: ""', "url: https://github.com/sample/place")
    config.write_text(text.replace("adv_book: tools", f"adv_book: {ROOT / 'tools'}"))
    server, address = serve(book.site(ROOT, tmp_path, config))
    with Visit(browser, address, "book/geometry.html", DESK) as visit:
        links = visit.page.evaluate("() => [...document.querySelectorAll('a')].map(a => a.href)")
    server.shutdown()
    server.server_close()
    assert (
        "https://colab.research.google.com/github/sample/place/blob/main/book/geometry.ipynb"
        in links
    )
    assert (
        "https://mybinder.org/v2/gh/sample/place/main?urlpath=lab/tree/book/geometry.ipynb" in links
    )
