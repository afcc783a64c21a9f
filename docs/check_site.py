"""Opens every page of the built site in a browser and looks for what is wrong.

``python docs/check_site.py docs/_build/html`` serves the folder on this machine, opens
each page as wide as a desktop and as a telephone, and lists: errors on the console,
requests that leave the machine, links and anchors that lead nowhere, pages wider than
the screen, images without a text, text too pale on its background in light or dark,
and what the search does not find. Says so and stops where there is no Chromium.
"""

import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlparse

from msam_optax import methods

WIDTHS = {"desktop": 1280, "telephone": 390}
SEARCHES = ["rho", "eval_params", "momentum_fn", *methods.__all__]
LOWEST_CONTRAST = 4.5  # WCAG 2, AA
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    # The browser's own errands, which fail one by one in a closed network.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

# The lowest contrast among the texts of the page, and the text.
CONTRAST = """
() => {
  const texts = "article p, article li, article a, article td, article span, nav a";
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => {
    const [r, g, b] = colour.slice(0, 3).map(v => {
      v /= 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  let worst = [21, ""];
  for (const element of document.querySelectorAll(texts)) {
    if (!element.innerText || !element.offsetParent) continue;
    const front = luminance(parse(getComputedStyle(element).color));
    const back = luminance(behind(element));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.innerText.slice(0, 40)];
  }
  return worst;
}
"""
IDS = "[...document.querySelectorAll('[id]')].map(e => e.id)"
LINKS = "[...document.querySelectorAll('a[href]')].map(e => e.href)"
MUTE = "[...document.images].filter(e => !e.alt).map(e => e.src)"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the browser went on before all was sent


def serve(folder: Path) -> str:
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


class Look:
    """One pass over the site; `wrong` has a line for everything that is."""

    def __init__(self, folder: Path, browser: Any) -> None:
        self.folder, self.browser, self.root = folder, browser, serve(folder)
        self.wrong: list[str] = []
        self.now = ""
        self.anchors: dict[str, set[str]] = {}
        self.links: list[tuple[str, str]] = []

    def say(self, what: str) -> None:
        self.wrong.append(f"{self.now}: {what}")

    def open(self, width: int) -> Any:
        page = self.browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", self.on_console)
        page.on("pageerror", lambda error: self.say(f"script: {error}"))
        page.on("request", self.on_request)
        return page

    def on_console(self, message: Any) -> None:
        if message.type == "error":
            self.say(f"console: {message.text}")

    def on_request(self, request: Any) -> None:
        if not request.url.startswith((self.root, "data:", "blob:")):
            self.say(f"asks {request.url}")

    def pages(self) -> list[str]:
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*.html"))
        left_out = ("_", "genindex", "search", "py-modindex")
        return sorted(p.as_posix() for p in found if not str(p).startswith(left_out))

    def at_width(self, device: str) -> None:
        page = self.open(WIDTHS[device])
        for name in self.pages():
            self.now = f"{name}, {device}"
            page.goto(self.root + name)
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > WIDTHS[device]:
                self.say(f"is {wide} pixels wide")
            if device == "desktop":
                self.contents(name, page)
        page.close()

    def contents(self, name: str, page: Any) -> None:
        self.anchors[name] = set(page.evaluate(IDS))
        self.links += [(name, href) for href in page.evaluate(LINKS)]
        for source in page.evaluate(MUTE):
            self.say(f"image without a text: {source}")
        for scheme in ("light", "dark"):
            page.evaluate(f"document.documentElement.dataset.theme = '{scheme}'")
            ratio, text = page.evaluate(CONTRAST)
            if ratio < LOWEST_CONTRAST:
                self.say(f"{scheme}: contrast {ratio:.1f} of {text!r}")

    def follow(self) -> None:
        for name, href in self.links:
            self.now = name
            target, anchor = urldefrag(href)
            if not target.startswith(self.root):
                continue
            path = urlparse(target).path.lstrip("/") or "index.html"
            known = self.anchors.get(path)
            if not (self.folder / path).exists():
                self.say(f"leads to {path}, which is not there")
            elif anchor and known is not None and anchor not in known:
                self.say(f"leads to {path}#{anchor}, which is not there")

    def search(self) -> None:
        page = self.open(WIDTHS["desktop"])
        for words in SEARCHES:
            self.now = f"search for {words}"
            page.goto(f"{self.root}search.html?q={words}")
            page.wait_for_function(
                "!document.querySelector('.search-summary')?.innerText.endsWith('...')"
                " && document.querySelector('.search-summary')"
            )
            if not page.query_selector("#search-results ul.search li"):
                self.say("finds nothing")
        page.close()


def main() -> None:
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        print("check_site: skipped, there is no Chromium on this machine")
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        look = Look(Path(sys.argv[1]).resolve(), browser)
        for device in WIDTHS:
            look.at_width(device)
        look.follow()
        look.search()
        browser.close()
    print("\n".join(look.wrong) or f"check_site: {len(look.anchors)} pages, all well")
    sys.exit(bool(look.wrong))


if __name__ == "__main__":
    main()
