"""The page of `cache show` in Chromium: colours, keyboard, what a screen reader is told, both themes and widths."""

import re

import pytest

from shared.eval.show.page import look_into, render_page
from tests.support.browser import Browser, needs_chromium
from tests.support.text_cache import make_text_cache, save_student

pytestmark = needs_chromium
TEXT = "def f(x):\n    return x  # ü\n" * 3
HOSTILE = "</script><script>document.title='taken'</script><img src=http://localhost:1/x onerror=alert(1)>\x00\u202e"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    cache, _ = make_text_cache(folder / "cache", [TEXT, HOSTILE], ids=["code", "<img src=x>"])
    student = save_student(folder / "student", positions=256)
    for name, run in (("teacher", None), ("student", student)):
        (folder / f"{name}.html").write_bytes(render_page(look_into(cache.path, student=run)))
    return folder, {
        name: look_into(cache.path, student=student if name == "student" else None) for name in ("teacher", "student")
    }


def contrast(browser, element, background):
    """WCAG's contrast of an element's text with a colour of the page, both as the browser has computed them."""
    script = f"""(() => {{
      const read = (color) => {{
        const context = Object.assign(document.createElement("canvas"), {{width: 1, height: 1}}).getContext("2d");
        for (const layer of [getComputedStyle(document.body).backgroundColor, color]) {{
          context.fillStyle = layer; context.fillRect(0, 0, 1, 1);
        }}
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
      }};
      const light = (rgb) => rgb.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const colors = [getComputedStyle({element}).color, getComputedStyle({background}).backgroundColor];
      const pair = colors.map((color) => light(read(color)));
      return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    }})()"""
    return browser.evaluate(script)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 380])
def test_nothing_overflows_and_all_is_readable(browser, pages, dark, width):
    browser.open(pages[0] / "student.html", width=width, dark=dark)
    browser.evaluate("document.querySelector('button[data-token]').click()")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate("getComputedStyle(document.getElementById('panel')).display") == "block"
    for level in range(9):
        token = f"document.querySelector('.scale .s{level}')"
        assert contrast(browser, token, token) >= 4.5
    for element in ("document.querySelector('.quiet')", "document.querySelector('dt')", "document.body"):
        assert contrast(browser, element, "document.body") >= 4.5
    chosen, panel = (browser.evaluate(f"document.querySelector('{name}').getBoundingClientRect().toJSON()")
                     for name in (".chosen", "#panel"))  # fmt: skip
    assert chosen["right"] <= panel["left"] or chosen["bottom"] <= panel["top"]  # the panel hides no chosen token


def test_the_keyboard_reaches_every_token_and_the_screen_reader_is_told(browser, pages):
    folder, looks = pages
    document = looks["teacher"].documents[0]
    browser.open(folder / "teacher.html")
    browser.evaluate("document.querySelector('.text b').focus()")

    def position():
        return browser.evaluate("document.activeElement.position")

    assert browser.evaluate("document.getElementById('said').textContent").endswith("nothing predicts it.")
    assert browser.evaluate("document.activeElement.getAttribute('role')") == "option"
    for key, expected in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", len(document.tokens) - 1)]:
        browser.press(key)
        assert position() == expected
    browser.press("Home")
    browser.press("n")
    surprising = [token.position for token in document.tokens if token.row and token.row.level >= 4]
    assert position() == surprising[0]
    browser.press("n")
    browser.press("p")
    assert position() == surprising[0]
    browser.press("ArrowDown")
    first_line = document.tokens[0].piece.text + TEXT.split("\n")[0] + "\n"
    assert position() > len(first_line) - len("<|endoftext|>")
    token = document.tokens[position()]
    said = browser.evaluate("document.getElementById('said').textContent")
    assert said.startswith(f"Token {token.position}: {token.label}; ")
    assert said == browser.evaluate("document.activeElement.getAttribute('aria-label')")
    assert browser.evaluate("document.querySelectorAll('[aria-selected=true]').length") == 1
    assert (
        browser.evaluate("document.querySelectorAll('.text:first-of-type b[tabindex=\"0\"]').length") == 2
    )  # one a text


def test_the_panel_shows_the_row(browser, pages):
    folder, looks = pages
    document = looks["student"].documents[0]
    token, row = document.striking(1)[0]
    browser.open(folder / "student.html")
    browser.evaluate("document.querySelector('button[data-token]').click()")
    assert (
        browser.evaluate("document.querySelector('#panel h2').textContent") == f"Token {token.position} {token.label}"
    )
    cells = browser.evaluate(
        "[...document.querySelectorAll('#panel tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert len(cells) == len(row.entries) + 1 + bool(row.num_more)
    assert float(re.match(r"[\d.]+", cells[0][1])[0]) == pytest.approx(100 * row.entries[0][1], abs=0.06)
    assert cells[-1][0] == "tail: all other ids" and cells[-1][2] == "100.0 %"
    facts = browser.evaluate("[...document.querySelectorAll('#panel dt')].map((t) => t.textContent)")
    assert facts == ["id", "teacher", "surprise", "student", "KL(teacher‖student)", "entropy"]


def test_the_colours_follow_surprise_or_kl(browser, pages):
    folder, looks = pages
    browser.open(folder / "student.html")
    heats = (
        "[...document.querySelectorAll('.text')[0].children].map((b) => getComputedStyle(b).getPropertyValue('--heat'))"
    )
    rows = [token.row for token in looks["student"].documents[0].tokens[1:]]
    percents = [f"{level * 11}%" for level in range(8)] + ["95%"]
    assert browser.evaluate(heats)[1:] == [percents[row.level] for row in rows]
    browser.evaluate("document.getElementById('by-kl').click()")
    assert browser.evaluate(heats)[1:] == [percents[row.kl_level] for row in rows]


def test_the_text_can_be_copied_as_it_is(browser, pages):
    browser.open(pages[0] / "teacher.html")
    assert browser.evaluate("document.querySelector('.text').textContent") == f"<|endoftext|>{TEXT}<|endoftext|>"


def test_hostile_text_runs_nothing_and_nothing_is_asked_for(browser, pages):
    browser.requests.clear()
    browser.errors.clear()
    browser.open(pages[0] / "teacher.html")
    assert browser.evaluate("document.title").endswith("what the teacher expected")
    assert browser.evaluate("document.querySelectorAll('script').length") == 2
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.requests == [(pages[0] / "teacher.html").resolve().as_uri()]
    assert browser.errors == []
