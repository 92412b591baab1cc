"""HTML page: its content, that it fetches nothing and escapes everything, and its sorting (needs Node)."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files

import pandas as pd
import pytest

from drelu_timm.errors import InputError
from drelu_timm.report import write_page
from drelu_timm.reports.sections import Section

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
SCRIPT = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Parsed page; asserts that every element is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.tables, self.words = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.replace("\u00a0", " ")
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def written(tmp_path):
    def write(*sections, title="Report"):
        path = tmp_path / "report" / "report.html"
        write_page(path, sections, title=title)
        assert list(path.parent.iterdir()) == [path]
        return path.read_text(encoding="utf-8")

    return write


TABLE = pd.DataFrame({"trained": ["AT", "D-ReLU-0.1"], "PGD": ["97.1 ± 0.2 (1)", None], "n": [1000, 500]})


def test_a_section_has_its_heading_text_table_and_picture(written, tmp_path):
    picture = tmp_path / "caps.png"
    picture.write_bytes(PNG)
    page = Page(
        written(Section("Main", "One.\nStill.\n\n\nTwo.", TABLE), Section("Caps", picture=picture), title="MNIST")
    )
    assert page.tables == [[["trained", "PGD", "n"], ["AT", "97.1 ± 0.2 (1)", "1000"], ["D-ReLU-0.1", "", "500"]]]
    assert [word for word in page.words if word in ("One.\nStill.", "Two.", "MNIST")] == ["MNIST"] * 2 + [
        "One.\nStill.",
        "Two.",
    ]
    (image,) = page.attributes("img")
    assert image["alt"] == "Caps"
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG
    assert len(page.attributes("p")) == 2


def test_the_contents_link_to_every_section(written):
    page = Page(written(Section("One"), Section("Two"), Section("One")))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [link["href"] for link in page.attributes("a")] == ["#section-1", "#section-2", "#section-3"]
    assert {link["href"][1:] for link in page.attributes("a")} < set(ids)
    assert {labelled["aria-labelledby"] for labelled in page.attributes("section")} < set(ids)


def test_nothing_is_fetched(written, tmp_path):
    picture = tmp_path / "caps.png"
    picture.write_bytes(PNG)
    html = written(Section("Main", "text", TABLE, picture))
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    for _, attributes in Page(html).elements:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    (policy,) = [meta["content"] for meta in Page(html).attributes("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_everything_is_escaped(written, tmp_path):
    picture = tmp_path / "caps.png"
    picture.write_bytes(PNG)
    table = pd.DataFrame({"&amp;": [SCRIPT, "{{ 7 * 7 }}"], SCRIPT: [SCRIPT, 'a" onclick="alert(1)']})
    html = written(Section(f'{SCRIPT}" onerror="alert(1)', SCRIPT, table, picture), title=SCRIPT)
    page = Page(html)
    assert html.count("<script>") == 1
    assert page.tables == [
        [["&amp;", SCRIPT], [SCRIPT, SCRIPT], ["{{ 7 * 7 }}", 'a" onclick="alert(1)']],
    ]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert SCRIPT in page.words


def test_every_heading_is_a_button_and_a_scope(written):
    page = Page(written(Section("Main", table=TABLE)))
    assert [heading["scope"] for heading in page.attributes("th")] == ["col"] * 3
    assert [button["type"] for button in page.attributes("button")] == ["button"] * 3


def test_masked_cells_are_marked_with_any_text_after_the_word(written):
    verdicts = ["masked", "sound", "masked 2 of 3", "undecided", "masked (on 500 images)", "D-ReLU, masked"]
    cells = Page(written(Section("Main", table=pd.DataFrame({"Verdict": verdicts})))).attributes("td")
    assert [cell.get("class") for cell in cells] == ["masked", None, "masked", None, "masked", None]


def test_the_same_sections_make_the_same_bytes(written):
    assert written(Section("Main", "text", TABLE)) == written(Section("Main", "text", TABLE))


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"gone\.png cannot be read \(No such file or directory\)\. Make the report again\."
    ):
        write_page(tmp_path / "report.html", [Section("Caps", picture=tmp_path / "gone.png")], title="Report")
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="session")
def in_node():
    """Run JavaScript after the page's, and return the JSON that it prints."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node to run the page's script in")
    html = files("drelu_timm.reports").joinpath("page.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    script = script.replace('"use strict";', '"use strict"; const document = { querySelectorAll: () => BUTTONS };')

    def run(code, before="const BUTTONS = [];"):
        done = subprocess.run([node, "-"], input=before + script + code, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("97.1 ± 0.2 (1)", 97.1),
        (" 5", 5),
        ("-3.5", -3.5),
        ("\u22123.5", -3.5),
        ("+2", 2),
        ("1.2e-05", 1.2e-5),
        ("100 %", 100),
        (".5", 0.5),
        ("≤ 78.40 ± 0.62", 78.4),
        ("AT", None),
        ("TRADES-6", None),
        ("–", None),
        ("", None),
    ],
)
def test_the_number_of_a_cell(in_node, text, number):
    assert in_node(f"console.log(JSON.stringify(leadingNumber({json.dumps(text)})))") == number


@pytest.mark.parametrize(
    ("cells", "ascending", "descending"),
    [
        (["9.5 (3)", "97.1 ± 0.2 (1)", "10 (2)"], ["9.5 (3)", "10 (2)", "97.1 ± 0.2 (1)"], None),
        (["2", "", "10", "–", "1"], ["1", "2", "10", "", "–"], ["10", "2", "1", "", "–"]),
        (["TRADES-10", "AT", "TRADES-6"], ["AT", "TRADES-6", "TRADES-10"], None),
        (["masked", "3", "-1"], ["-1", "3", "masked"], None),
    ],
)
def test_rows_are_sorted_by_a_column(in_node, cells, ascending, descending):
    for backwards, wanted in ((False, ascending), (True, descending or ascending[::-1])):
        rows = json.dumps([["x", cell] for cell in cells])
        found = in_node(f"console.log(JSON.stringify(sortedRows({rows}, 1, {json.dumps(backwards)})))")
        assert [cell for _, cell in found] == wanted


def test_ties_keep_their_order(in_node):
    rows = json.dumps([["b", "1"], ["a", "1"], ["c", "0"]])
    found = in_node(f"console.log(JSON.stringify([false, true].map((down) => sortedRows({rows}, 1, down))))")
    assert [[first for first, _ in rows] for rows in found] == [["c", "b", "a"], ["b", "a", "c"]]


FAKE_TABLE = """
const row = (...texts) => ({ cells: texts.map((textContent) => ({ textContent })) });
const body = { rows: [row("a", "2"), row("b", "10"), row("c", "1")], append(...rows) { this.rows = rows; } };
const table = { tBodies: [body], tHead: { rows: [{ cells: [] }] } };
const heading = (cellIndex) => ({
  cellIndex, attributes: {}, closest: () => table,
  getAttribute(name) { return this.attributes[name] ?? null; },
  setAttribute(name, value) { this.attributes[name] = value; },
  removeAttribute(name) { delete this.attributes[name]; },
});
const headings = table.tHead.rows[0].cells = [heading(0), heading(1)];
const BUTTONS = headings.map((th) => ({ closest: () => th, addEventListener(kind, click) { this[kind] = click; } }));
"""


def test_a_click_sorts_a_table_and_sets_aria_sort(in_node):
    clicks = """
    const seen = [1, 1, 0].map((column) => {
      BUTTONS[column].click();
      const order = body.rows.map((row) => row.cells[0].textContent).join("");
      return [order, headings.map((th) => th.attributes["aria-sort"])];
    });
    console.log(JSON.stringify(seen));
    """
    assert in_node(clicks, FAKE_TABLE) == [
        ["cab", [None, "ascending"]],
        ["bac", [None, "descending"]],
        ["abc", ["ascending", None]],
    ]
