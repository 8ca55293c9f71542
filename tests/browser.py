"""The page in a real browser, against a real server: `python tests/browser.py`. By hand: needs chromium and playwright.

    apt-get install chromium && pip install playwright
    python tests/browser.py                        # starts python -m rfjax.serve with the shipped model
    python tests/browser.py --fake                 # the batch without a network, for work on the page
    python tests/browser.py --pictures docs/media  # and keeps its screenshots

Prints a line a check, with what was measured, and ends with exit code 1 where one fails.
"""

import argparse
import base64
import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from served import Checks, server

from rfjax import detect, shapes

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LOOKS = {"desktop": (1440, 900), "phone": (390, 844)}
GRAB = "() => document.getElementById('video').toDataURL('image/png').split(',')[1]"
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, canvas, section, summary")].filter((one) =>
  one.getClientRects().length && !one.textContent.trim() && !one.ariaLabel && !one.labels?.length).map((one) => one.outerHTML)"""
HIDDEN = """(names) => names.filter((name) => {
  const box = document.getElementById(name).getBoundingClientRect();
  const strip = document.querySelector(".strip").getBoundingClientRect();
  return !box.width || box.top < 0 || box.bottom > strip.top || box.left < 0 || box.right > innerWidth; })"""
SLOW = 120_000  # milliseconds after which something that does not come counts as missing


def missing() -> str | None:
    """Why this cannot run here."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: pip install playwright"
    if not any(map(shutil.which, BROWSERS)):
        return "there is no chromium: apt-get install chromium"
    return None


def wait(page, phase: str) -> None:
    page.wait_for_selector(f"body[data-phase={phase}]", timeout=SLOW)


def number(page, name: str) -> float:
    """A figure on the page; NaN where there is none yet."""
    text = page.inner_text(f"#{name}")
    return float(text) if re.fullmatch(r"[\d.]+", text) else float("nan")


def film(page, seconds: float) -> np.ndarray:
    """What the canvas shows, a picture each 1/16 s: uint8 [F, 64, 64, 3]."""
    pictures, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        data = Image.open(io.BytesIO(base64.b64decode(page.evaluate(GRAB)))).convert("RGB")
        pictures.append(np.asarray(data.resize((64, 64), Image.Resampling.NEAREST)))
        time.sleep(1 / 16)
    return np.stack(pictures)


def seen(page, seconds: float = 3.0) -> tuple[str, str, str]:
    """Colour, shape and background that the detector sees on the canvas."""
    found = detect.detect(film(page, seconds))
    return found.objects[0].colour, found.objects[0].shape, found.background


def says(prompt: str) -> tuple[str, str, str]:
    named = shapes.parse(prompt)
    return named.objects[0].colour, named.objects[0].shape, named.background


def watch(page, check: Checks, seconds: float) -> None:
    """First frame, frame rate, a new prompt, pause and stop."""
    wait(page, "ready")
    page.click("#curtain")
    wait(page, "playing")
    check("first frame within 3 s", number(page, "first") <= 3, f"{number(page, 'first'):.2f} s")
    first, began = int(page.evaluate("window.drawn ?? 0")), time.monotonic()
    time.sleep(seconds)
    rate = (int(page.evaluate("window.drawn")) - first) / (time.monotonic() - began)
    check(f"15 fps or more over {seconds:.0f} s", rate >= 15, f"{rate:.2f} fps")
    prompt = page.input_value("#prompt")
    check("the detector sees the prompt", seen(page) == says(prompt), f"{seen(page)} for {prompt!r}")
    page.fill("#prompt", "a dragon")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#hint:has-text('dragon')")
    check("an unknown word is told", True, page.inner_text("#hint"))
    new = shapes.PROMPTS[1]
    page.fill("#prompt", new)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#changes li:nth-child(2)", timeout=SLOW)
    time.sleep(8)  # the blocks that were under way
    found = seen(page)
    check(
        "the detector sees the new prompt",
        found == says(new),
        f"{found} for {new!r}, {number(page, 'change')} s",
    )


def hold(page, check: Checks) -> None:
    page.keyboard.press("Escape")
    page.keyboard.press(" ")
    wait(page, "paused")
    before = page.evaluate(GRAB)
    time.sleep(2)
    check("pause holds the picture", page.evaluate(GRAB) == before)
    page.keyboard.press(" ")
    wait(page, "playing")
    time.sleep(1)
    check("and it goes on", page.evaluate(GRAB) != before)


def restart(page, check: Checks) -> None:
    """By keys: the same seed begins with the same picture, another one with another."""
    begun, seeds = [], []
    for key in "rrn":
        starts = page.evaluate("window.openings.length")
        page.keyboard.press(key)
        page.wait_for_selector(f"body[data-openings='{starts + 1}']", timeout=SLOW)
        wait(page, "playing")
        begun.append(page.evaluate("window.openings.at(-1)"))
        seeds.append(page.input_value("#seed"))
    check("R begins with the same picture", begun[0] == begun[1] and seeds[0] == seeds[1], seeds[0])
    check("N begins with another", begun[0] != begun[2] and seeds[0] != seeds[2], seeds[2])
    check("and with a timeline of its own", page.locator("#changes li").count() == 1)


def record(page, check: Checks, folder: Path) -> None:
    import av

    page.click("#record")
    time.sleep(4)
    with page.expect_download(timeout=SLOW) as download:
        page.click("#record")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    with av.open(str(path)) as file:
        frames = sum(1 for _ in file.decode(video=0))
    check("a recording is saved and plays", frames >= 30, f"{path.name}, {frames} frames")


def crowd(browser, page, address: str, check: Checks) -> None:
    """A second viewer at the same time, a third that finds no place, and one that leaves."""
    others = [open_page(browser, address) for _ in range(2)]
    for other in others:
        wait(other, "ready")
        other.click("#curtain")
        other.wait_for_selector("body[data-phase=playing], body[data-phase=full]", timeout=SLOW)
    phases = [other.get_attribute("body", "data-phase") for other in others]
    check(
        "two play at once, the third is told",
        phases == ["playing", "full"],
        others[1].inner_text("#curtain-why"),
    )
    time.sleep(5)
    rates = [number(one, "fps") for one in (page, others[0])]
    check("both at 15 fps or more", min(rates) >= 15, rates)
    others[0].click("#stop")
    time.sleep(0.5)
    others[1].click("#curtain")
    wait(others[1], "playing")
    check("a place that is left is free", True)
    for other in others:
        other.context.close()


def looks(browser, address: str, check: Checks, folder: Path | None) -> None:
    """What is in sight at once on a desktop and on a phone, and that all has a name; with a folder, pictures of every look."""
    for look, (width, height) in LOOKS.items():
        for scheme in ("light", "dark") if folder else ("dark",):
            page = open_page(browser, address, width, height, scheme)
            wait(page, "ready")
            page.click("#curtain")
            wait(page, "playing")
            hidden = page.evaluate(HIDDEN, ["prompt", "pause", "restart", "record", "stop"])
            check(f"{look}: sentence and controls are in sight, without scrolling", not hidden, hidden or "")
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            check(f"{look}: nothing hangs over the side", wide <= 0, f"{wide} px" if wide > 0 else "")
            nameless = page.evaluate(NAMELESS)
            check(f"{look}: all has a name for who does not see it", not nameless, nameless or "")
            if folder:
                picture(page, folder / f"live-{look}-{scheme}.png")
            page.context.close()


def picture(page, file: Path) -> None:
    """While it plays and a new prompt is on its way."""
    time.sleep(8)
    page.click("#words button[data-row=shape][value=star]")
    time.sleep(10)
    page.click("#words button[data-row=background][value=purple]")
    page.wait_for_selector("#mirror mark")
    page.evaluate("scrollTo(0, 0)")
    page.mouse.move(0, 0)
    page.screenshot(path=file)


def open_page(browser, address: str, width: int = 1440, height: int = 900, scheme: str = "dark"):
    options = dict(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = browser.new_context(**options, device_scale_factor=1 if width > 500 else 2).new_page()
    page.set_default_timeout(SLOW)
    page.add_init_script(
        "const draw = CanvasRenderingContext2D.prototype.drawImage; window.drawn = 0; window.openings = [];"
        "CanvasRenderingContext2D.prototype.drawImage = function (...of) {"
        " const drawn = draw.apply(this, of);"
        " if (this.canvas.id === 'video') { window.drawn += 1;"
        " if (document.body.dataset.phase === 'starting')"
        " document.body.dataset.openings = window.openings.push(this.canvas.toDataURL()); }"
        " return drawn; };"
    )
    page.problems, page.asked = [], set()
    page.on("request", lambda request: page.asked.add(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: line.type == "error" and page.problems.append(line.text))
    page.goto(address)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--fake", action="store_true", help="the batch without a network in place of the model"
    )
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="over which the rate is taken (default 30)"
    )
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="keep screenshots there")
    args = parser.parse_args()
    if why := missing():
        return print(f"skipped: {why}")
    from playwright.sync_api import sync_playwright

    check = Checks()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        program = next(filter(None, map(shutil.which, BROWSERS)))
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium does not run as root with it
        chromium = stack.enter_context(sync_playwright()).chromium
        browser = chromium.launch(executable_path=program, args=flags)
        words = ("--port", str(args.port), "--limit", "2")
        with server(*words, fake=args.fake) as (address, process):
            page = open_page(browser, address)
            watch(page, check, args.seconds)
            hold(page, check)
            record(page, check, folder)
            restart(page, check)
            crowd(browser, page, address, check)
            page.click("#stop")
            looks(browser, address, check, args.pictures)
            page.click("#curtain")
            wait(page, "playing")
            process.terminate()
            code = process.wait(60)
            wait(page, "lost")
            why = page.inner_text("#curtain-why")
            check(
                "SIGTERM in mid-stream: exit code 0, and the page says so",
                not code and "shutting down" in why,
                why,
            )
        with server(*words, fake=args.fake):
            wait(page, "playing")
            check("when the server is back, the page goes on by itself", True)
            page.click("#stop")
            wait(page, "ready")
            check("stop", True)
        lines = [line for line in page.problems if "WebSocket connection" not in line]  # while it was down
        check("no error on the page", not lines, lines or "")
        strange = [url for url in page.asked if not url.startswith((address, "blob:"))]
        check("nothing was asked of any other place", len(page.asked) > 5 and not strange, strange or "")
        browser.close()
    sys.exit(check.failed > 0)


if __name__ == "__main__":
    main()
