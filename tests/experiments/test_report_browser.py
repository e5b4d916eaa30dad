"""The report in headless Chromium: no errors, no requests, sorting by mouse and keyboard, no overflow."""

import os
import shutil

import pytest

REQUIRED = os.environ.get("EXPERTSLICE_REQUIRE_BROWSER") == "1"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing():
    """Return why no browser can be had, or None."""
    if CHROMIUM is None:
        return "no Chromium on the path; install it to run browser tests"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed; install the dev extra to run browser tests"
    return None


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    reason = missing()
    if reason and REQUIRED:
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    profile = tmp_path_factory.mktemp("profile")
    with sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, headless=True, args=FLAGS, viewport={"width": 1280, "height": 900}
        )
        yield context
        context.close()


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")], ids=str)
def page(request, browser, finished):
    width, scheme = request.param
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.problems, page.requested = [], []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda asked: page.requested.append(asked.url))
    page.goto((finished[2] / "report.html").as_uri())
    yield page
    page.close()


def test_it_loads_without_errors_or_requests(page):
    assert page.problems == []
    assert [url for url in page.requested if not url.endswith("report.html") and not url.startswith("data:")] == []


def test_nothing_is_wider_than_the_window(page):
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1]


def first_column(page, column):
    """Return the values of one column of the ranking, bounds left out."""
    return page.eval_on_selector_all(
        "#which table >> nth=0 >> tbody tr", f"rows => rows.map(row => row.cells[{column}].dataset.value)"
    )


def test_a_click_sorts_and_another_turns_it_round(page):
    head = page.locator("#which table").first.locator("thead th").nth(1)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    up = [float(v) for v in first_column(page, 1)]
    assert up == sorted(up)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(v) for v in first_column(page, 1)] == sorted(up, reverse=True)


def test_the_keyboard_sorts_as_well_and_unknown_values_stay_last(page):
    heads = page.locator("#which table").first.locator("thead th")
    heads.last.locator("button").focus()
    page.keyboard.press("Enter")
    assert heads.last.get_attribute("aria-sort") == "ascending"
    ranks = first_column(page, heads.count() - 1)
    assert ranks[-1] == ""
    assert [float(rank) for rank in ranks[:-1]] == sorted(float(rank) for rank in ranks[:-1])
    page.keyboard.press("Space")
    assert first_column(page, heads.count() - 1)[-1] == ""
    heads.first.locator("button").click()
    assert heads.last.get_attribute("aria-sort") == "none"
    assert first_column(page, 0) == sorted(first_column(page, 0))


def test_figures_have_words_and_fit_their_text(page):
    for image in page.locator("figure svg").all():
        assert image.get_attribute("aria-label")
    # Texts of one figure must not lie on each other.
    overlaps = page.evaluate(
        """() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
            const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
            const boxes = texts.map(t => t.getBoundingClientRect());
            const found = [];
            for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
                const a = boxes[i], b = boxes[j];
                const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                const touch = x > 2 && y > 0.4 * Math.min(a.height, b.height);
                if (touch) found.push([texts[i].textContent, texts[j].textContent]);
            }
            return found;
        })"""
    )
    assert overlaps == []


def test_it_reads_in_both_schemes(page):
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(int(v) for v in colour[4:-1].split(",")) for colour in (ink, paper)]
    assert abs(light[0] - light[1]) > 450
    drawn = page.eval_on_selector("figure svg text", "text => getComputedStyle(text).fill")
    assert drawn == ink
