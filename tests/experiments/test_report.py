"""The report: its order, its words, and that it stands alone."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from expertslice.experiments import report
from expertslice.experiments.cli import app
from expertslice.experiments.plotting import Drawn, inline_svg

ORDER = ["which", "why", "cost", "trust", "next"]


@pytest.fixture(scope="module")
def page(finished):
    return (finished[2] / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects tags and checks that they are closed in order."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def tags_of(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags.found


def test_answers_stand_in_the_order_of_the_questions(page):
    assert [attrs["id"] for tag, attrs in tags_of(page) if tag == "section"] == ORDER


def test_nothing_is_asked_of_the_network(page):
    for _, attrs in tags_of(page):
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert not re.match(r"\s*(https?:|//|file:)", attrs.get(name) or "")
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_every_figure_has_a_caption_and_says_what_it_shows(page):
    found = tags_of(page)
    figures = [attrs["id"] for tag, attrs in found if tag == "figure"]
    images = [attrs for tag, attrs in found if tag == "svg"]
    assert len(figures) == len(images) >= 5
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 40 for attrs in images)
    assert page.count("<figcaption>") == len(figures)


def test_ids_are_unique(page):
    ids = [attrs["id"] for _, attrs in tags_of(page) if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_provisional_stands_where_it_matters(finished, page):
    assert page.count("rovisional") >= 5
    assert 'class="provisional"' in page
    assert "rovisional" in finished[2].joinpath("manifest.json").read_text()
    assert "rovisional" in finished[2].joinpath("summary.json").read_text()


def test_strings_of_users_are_escaped(finished):
    case, summary, _ = finished
    evil = '<script>alert("x")</script>'
    summary = summary | {"trace": summary["trace"] | {"name": evil}, "notes": [evil]}
    drawn = Drawn(name="ranking", title=evil, caption=evil, svg=inline_svg("<svg><g/></svg>", "ranking", evil, evil))
    page = report.render(case, summary, [drawn])
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") >= 4


def test_every_column_sorts_and_every_cell_has_a_value(page):
    found = tags_of(page)
    heads = [attrs for tag, attrs in found if tag == "th" and attrs.get("scope") == "col"]
    assert heads
    assert all(attrs["aria-sort"] == "none" for attrs in heads)
    assert sum(tag == "button" for tag, _ in found) == len(heads)
    assert all("data-value" in attrs for tag, attrs in found if tag == "td")


def test_every_command_that_is_proposed_exists(page):
    proposed = re.findall(r"<pre>expertslice (\w+)", page)
    assert "pair" in proposed
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(proposed) <= known | {"trace"}


def test_suggested_commands_exist(finished):
    import shlex

    from expertslice.experiments import cli

    case, summary, _ = finished
    for said, command in report.next_steps(case.options, summary):
        words = shlex.split(command)[1:]
        if "runtime" not in said:
            path = words[:2] if words[0] == "trace" else words[:1]
            assert cli.run([*path, "--help"]) == 0


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([("unsliced", 1, 0.0, False), ("a", 1, 1.0, False)], "Stay unsliced: no policy is faster"),
        ([("a", 1, -3.0, False), ("unsliced", 1, 0.0, False)], "Stay unsliced: no policy is faster"),
        ([("a", 1, -5.0, True), ("unsliced", 2, 0.0, False)], "a: −5.0 % (−6.0 … −4.0) against unsliced"),
        ([("a", 1, -5.0, True), ("b", 1, -4.8, True), ("unsliced", 3, 0.0, False)], "b cannot be told from it"),
        ([("a", 1, -5.0, False), ("b", 1, -4.0, True), ("unsliced", 1, 0.0, False)], "b: −4.0 % (−5.0 … −3.0)"),
    ],
)
def test_the_verdict_names_what_is_surely_faster(ranks, expected):
    rows = [
        {
            "policy": n,
            "rank": r,
            "deployable": True,
            "effect_percent": e,
            "effect_interval_percent": [e - 1.0, e + 1.0],
            "surely_faster": s,
        }
        for n, r, e, s in ranks
    ]
    assert expected in report.verdict({"ranking": rows})


def test_a_calibrated_device_is_not_called_provisional(finished):
    case, summary, _ = finished
    device = replace(case.world.device, status="calibrated")
    case = replace(case, world=replace(case.world, device=device))
    summary = summary | {"provisional": False, "device": summary["device"] | {"status": "calibrated"}}
    page = report.render(case, summary, [])
    assert "<strong>Provisional" not in page
    assert "PROVISIONAL" not in page
