"""The documentation: built from the notebooks, every link followed, and looked at in a browser where there is one."""

import ast
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest


@pytest.fixture(scope="session")
def site(root, tmp_path_factory):
    pytest.importorskip("myst_nb", reason="the extra `docs` is not installed")
    out = tmp_path_factory.mktemp("docs")
    done = subprocess.run([sys.executable, root / "docs" / "build.py", out], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]  # a warning is an error
    return out / "html"


class Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.sources, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given["href"]] if tag == "a" and given.get("href") else []
        self.sources += [
            given[key]
            for key in ("src", "href")
            if given.get(key) and tag in ("img", "script", "link") and given.get("rel") not in ("canonical",)
        ]


@pytest.fixture(scope="session")
def pages(site):
    return {path: Page(path.read_text()) for path in sorted(site.glob("**/*.html")) if "_static" not in path.parts}


def is_outside(address):
    return re.match(r"[a-z]+:", address) is not None


def test_every_internal_link_and_image_leads_somewhere(site, pages):
    broken, followed = [], 0
    for path, page in pages.items():
        for address in filter(lambda a: not is_outside(a), page.links + page.sources):
            file, anchor = urldefrag(address)
            target = (path.parent / unquote(file.partition("?")[0])).resolve() if file else path
            anchored = not anchor or target not in pages or unquote(anchor) in pages[target].ids
            followed += 1
            if not (target.is_file() and anchored):
                broken.append(f"{path.relative_to(site)}: {address}")
    assert broken == [] and followed > 1000


def test_scripts_styles_fonts_and_images_come_from_the_site(site, pages):
    assert [(path.name, source) for path, page in pages.items() for source in page.sources if is_outside(source)] == []
    styles = "".join(path.read_text() for path in site.glob("_static/**/*.css"))
    assert re.findall(r"url\(['\"]?https?:", styles) == [] and list(site.glob("_static/mathjax/**/*.woff"))


def test_navigation_knows_every_notebook(root, site, pages):
    text = (site / "index.html").read_text()
    captions = re.findall(r'class="caption-text">(.*?)<', text)
    assert captions == ["Get started", "Method", "The paper", "Baselines", "Reference"]
    wanted = {p.relative_to(root).with_suffix(".html").as_posix() for p in (root / "nbs").glob("**/[!.]*.ipynb")}
    wanted |= {"api/index.html", "figures/README.html", "docs/contributing.html"}
    assert wanted - set(pages[site / "index.html"].links) == set()


def test_api_documents_every_public_name(root, site, pages):
    imported = [
        (n.module, a.name)
        for n in ast.parse((root / "deepkmeans" / "__init__.py").read_text()).body
        if isinstance(n, ast.ImportFrom)
        for a in n.names
    ]
    for module, name in imported:
        path = site / "api" / f"{module.removeprefix('deepkmeans.')}.html"
        assert f"{module}.{name}" in pages[path].ids, name
    text = re.sub(r"<[^>]+>", "", (site / "api" / "sharing.html").read_text())
    signature = (
        "share(model: nn.Module, plan: dict[str, LayerPlan], *, codes: dict[str, torch.Tensor] | None = None, "
        "seed: int | torch.Generator = 0, backend: str = 'auto', progress: bool = False)"
    )
    data = re.sub(r"<[^>]+>", "", (site / "api" / "data.html").read_text())
    assert "class Data(train: Split | Files, " in data and "'Split" not in data
    plan = re.sub(r"<[^>]+>", "", (site / "api" / "plan.html").read_text())
    assert "clusters in every layer, or one number for each planned layer in order" in plan
    for said in (
        signature,
        "what it is",
        "Raises ValueError for unknown or shared",
        "source",
    ):
        assert said in text, said
    assert "../nbs/03_sharing.html#sharing-share" in pages[site / "api" / "sharing.html"].links


def test_search_index_holds_the_words(site):
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)\s*", (site / "searchindex.js").read_text(), re.S)[1])
    titles = [index["titles"][i] for i in index["terms"]["spectral"]]
    assert "The regularizer" in titles and {"codebook", "energi", "papermil"} <= set(index["terms"])


# In a browser


@pytest.fixture(scope="session")
def browser():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        pytest.skip("there is no chromium here (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])


@pytest.fixture(scope="session")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


LOOK = """async () => {
  if (window.MathJax) await MathJax.startup.promise;
  const formulas = [...document.querySelectorAll('.math')];
  const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number);
  return {wide: document.documentElement.scrollWidth - innerWidth, light: (r + g + b) / 765, formulas: formulas.length,
          raw: formulas.filter(e => !e.querySelector('mjx-container')).length,
          wrong: document.querySelectorAll('mjx-merror').length,
          cut: [...document.querySelectorAll('pre')].filter(
            e => !e.closest('.cell_output') && e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60)),
          missing: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)};
}"""


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 390)])
def test_each_page_looks_right(site, pages, browser, address, scheme, width):
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    said, formulas = [], 0
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request",
        lambda request: said.append(f"asks {request.url}") if not request.url.startswith((address, "data:")) else None,
    )
    for path in pages:
        page.goto(address + path.relative_to(site).as_posix())
        seen = page.evaluate(LOOK)
        name = path.relative_to(site)
        formulas += seen["formulas"]
        assert seen["wide"] <= 0, f"{name} is {seen['wide']} pixels wider than the screen"
        assert seen["cut"] == [], f"code of {name} is cut off"
        assert seen["raw"] == seen["wrong"] == 0 and not seen["missing"], (name, seen)
        assert (seen["light"] > 0.9) == (scheme == "light"), (name, seen)
        assert said == [], (name, said)
    assert formulas > 100


def search(browser, address, word):
    page = browser.new_page()
    page.goto(address + "index.html")
    page.fill("input.sidebar-search", word)
    page.press("input.sidebar-search", "Enter")
    page.wait_for_selector("#search-results ul.search li")
    page.wait_for_function("document.querySelector('#search-results .search-summary')?.innerText.includes('found')")
    return page


def test_search_finds_spectral(browser, address):
    assert "The regularizer" in search(browser, address, "spectral").inner_text("#search-results")


@pytest.mark.parametrize("name", ["retrain.train", "regularizer.Regularizer", "sharing.share", "clustering.kmeans"])
def test_search_finds_what_bears_the_name_first(browser, address, name):
    page = search(browser, address, name.rpartition(".")[2])
    assert f"deepkmeans.{name} " in page.inner_text("#search-results ul.search li >> nth=0") + " "
