"""The page as a browser draws it: sorted, filtered, on a phone and a desktop, light and dark."""

import html
import json
import re
import shutil
import subprocess

import pytest
from matplotlib.image import imread

from osrm_peft.evaluation.page import html_report, write_report
from osrm_peft.evaluation.results import gather
from tests.helpers.pages import IMAGE, Page, fill, fill_with_html, put, selection

CSP = re.compile(r"<meta http-equiv=.Content-Security-Policy.*?>")
SCHEMES = {"light": "1", "dark": "0"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of every kind of result."""
    root = tmp_path_factory.mktemp("page")
    fill(root / "results")
    put(root / "results/chosen/selection.json", selection("a", "b"))
    write_report([root / "results"], root / "page.html")
    return root / "page.html"


@pytest.fixture
def browse(tmp_path):
    """browse(page, *options): the DOM of a page, after its scripts, in a browser without a window."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is installed")

    def browsed(page, *options):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
        command += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=3000", *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return browsed


FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><style>body {{ margin: 0 }}
iframe {{ display: block; border: 0 }}</style>
<iframe width="{width}" height="{height}" srcdoc="{page}"></iframe>"""
PROBE = (
    FRAME
    + """<pre></pre><script>
onload = () => {{
  const inside = document.querySelector("iframe").contentDocument
  const texts = (selector, root = inside) => [...root.querySelectorAll(selector)].map(one => one.textContent.trim())
  document.querySelector("pre").textContent = JSON.stringify((() => {{ {script} }})())
}}
</script>"""
)


@pytest.fixture
def probe(tmp_path, browse):
    """probe(text, script): what a script returns that has the page as the document `inside`."""

    def probed(text, script, width=1280):
        filled = PROBE.format(page=html.escape(text), script=script, width=width, height=900)
        dom = browse(put(tmp_path / "probe.html", filled), "--dump-dom")
        return json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", dom, re.S)[1]))

    return probed


SORT = """
const table = inside.querySelector("table.ranked"), heads = [...table.tHead.rows[0].cells], seen = {}
for (const head of heads) {
  const name = head.firstChild.firstChild.textContent.trim(), column = head.cellIndex
  for (const time of [1, 2]) {
    head.querySelector("button").click()
    const values = [...table.tBodies[0].rows].map(row => row.cells[column].dataset.value ?? row.cells[0].textContent)
    const sorted = heads.filter(one => one.hasAttribute("aria-sort")).map(one => one.cellIndex)
    ;(seen[name] ??= []).push([head.getAttribute("aria-sort"), sorted.length, values])
  }
}
return {seen, groups: [...table.tBodies].map(body => body.rows.length), first: texts("tbody th[scope=rowgroup]"),
        second: table.tBodies[1].rows[0].textContent.trim(), status: texts("[role=status]")[0]}
"""


def test_a_click_on_a_column_sorts_by_it_and_another_turns_it_round(page, probe):
    found = probe(page.read_text(), SORT)
    assert list(found["seen"]) == ["merge", "λ", "average", "difference", "adaptation", "a", "b", "rows"]
    for name, clicks in found["seen"].items():
        for said, heads, values in clicks:
            assert heads == 1  # one column at a time
            known = [one if name == "merge" else float(one) for one in values if one != ""]
            assert known == sorted(known, reverse=said == "descending"), (name, values)
            assert values[len(known) :] == [""] * (len(values) - len(known))  # what has no value comes last
        assert {said for said, _, _ in clicks} == {"ascending", "descending"}
    assert found["seen"]["λ"][0][0] == "descending" and found["seen"]["merge"][0][0] == "ascending"
    assert found["groups"] == [5, 2, 4] and found["second"] == "With a mask for each task"  # groups stay groups
    assert found["status"] == "Sorted by rows scored, lowest first."


FILTER = """
const table = inside.querySelector("table.ranked")
const shown = () => [...table.querySelectorAll("tbody tr")].filter(row => row.offsetHeight)
  .map(row => row.cells[0].firstChild.textContent.trim())
const controls = inside.querySelector("fieldset"), [text] = controls.querySelectorAll("input[type=search]")
const change = (one, value) => {
  one.type === "checkbox" ? one.checked = value : one.value = value
  one.dispatchEvent(new Event("input", {bubbles: true}))
}
const box = controls.querySelector("input[value=tsv]"), steps = [[shown(), controls.offsetHeight > 0]]
change(box, false); steps.push([shown(), texts("[role=status]")[0]])
change(text, "TIES  56"); steps.push([shown(), texts("[role=status]")[0]])
change(text, ""); change(box, true)
controls.querySelector("button").click(); steps.push([shown(), texts("[role=status]")[0]])
controls.querySelector("button").click(); steps.push([shown(), texts("[role=status]")[0]])
return steps
"""


def test_merges_are_filtered_by_method_and_by_words(page, probe):
    start, unchecked, words, none, every = probe(page.read_text(), FILTER)
    others = ["To compare with", "individual adapters", "base under the heads", "individual adapters"]
    apart = ["With a mask for each task", "emr"]
    assert start == [["tsv", "ties", "tsv", "ties", "average", *apart, *others], True]
    assert unchecked == [["ties", "ties", "average", *apart, *others], "4 of 6 merges are shown."]
    assert words == [["ties", apart[0], *others], "1 of 6 merges are shown."]  # the mean of 56.5
    assert none == [[apart[0], *others], "0 of 6 merges are shown."]
    assert every == [start[0], "6 of 6 merges are shown."]


def test_the_page_runs_its_own_script_and_no_other(page, tmp_path, browse):
    text = page.read_text()
    pwned = "<script>document.body.id='pwned'</script>"
    foreign = put(tmp_path / "foreign.html", text.replace("</main>", f"{pwned}</main>"))
    dom = browse(foreign, "--dump-dom")
    assert '<th scope="col"><button type="button">merge</button></th>' in dom and 'id="pwned"' not in dom
    assert 'id="pwned"' in browse(put(tmp_path / "open.html", CSP.sub("", foreign.read_text())), "--dump-dom")


def test_without_a_script_the_table_is_ranked_and_has_no_controls(page):
    text = re.sub("<script>.*?</script>", "", page.read_text(), flags=re.S)
    read = Page(text)
    assert [row[0].split()[0] for row in read.tables[0][1:6]] == ["tsv", "ties", "tsv", "ties", "average"]
    assert all("hidden" in one for one in read.all("fieldset"))
    assert [one.get("aria-sort") for one in read.all("th")[:4]] == [None, None, "descending", None]


def test_names_from_files_run_nothing(tmp_path, probe):
    root = tmp_path / IMAGE.replace("/", "")
    fill_with_html(root)
    page = html_report(gather([root]))
    open_to_scripts = CSP.sub("", page)  # so that one could run
    assert open_to_scripts != page
    script = """inside.querySelectorAll("thead button").forEach(one => one.click())
    return {pwned: inside.body.id, scripts: inside.scripts.length, width: inside.scrollingElement.scrollWidth,
            images: [...inside.images].map(one => one.naturalWidth), elements: texts("main img[src=x]").length}"""
    seen = probe(open_to_scripts, script, width=380)
    assert seen["pwned"] == "" and seen["scripts"] == 1 and seen["elements"] == 0
    assert len(seen["images"]) == 5 and min(seen["images"]) > 200  # all were loaded
    assert seen["width"] <= 380  # what is wider scrolls in its own box


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_page(page, probe, width):
    script = """inside.querySelectorAll("details").forEach(one => { one.open = true })
    return [inside.scrollingElement.scrollWidth, inside.defaultView.innerWidth, inside.scrollingElement.scrollHeight]"""
    scrolls, inner, height = probe(page.read_text(), script, width)
    assert inner == width and scrolls <= inner and height > 1000


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_drawn_light_and_dark_on_a_phone_and_a_desktop(page, tmp_path, browse, width, scheme):
    frame = put(tmp_path / "frame.html", FRAME.format(page=html.escape(page.read_text()), width=width, height=3000))
    pixels = shot(browse, frame, tmp_path, (max(width, 500), 3000), scheme)[:, :width]
    assert pixels.shape == (3000, width, 3)
    background = pixels[0, 0]
    assert (background.mean() > 0.9) == (scheme == "light") and (pixels[:10] == background).all()
    for part in range(0, 2400, 400):  # no part of it is empty
        assert (abs(pixels[part : part + 400] - background).max(-1) > 0.3).mean() > 0.002, part


@pytest.mark.parametrize("scheme", SCHEMES)
def test_plots_are_drawn_in_the_scheme_s_colours(page, tmp_path, browse, scheme):
    """Text and axes have the contrast of text."""
    color, images = {"light": "#ffffff", "dark": "#14171b"}[scheme], Page(page.read_text()).all("img")
    text = '<!DOCTYPE html><meta name="color-scheme" content="light dark"><style>img { display: block } '
    text += f"body {{ margin: 0; background: {color} }}</style>"
    text += "".join(f'<img width="1200" height="800" src="{image["src"]}">' for image in images)
    drawn = shot(browse, put(tmp_path / "plots.html", text), tmp_path, (1200, 800 * len(images)), scheme)
    background = int(color[1:3], 16) / 255
    for place, image in enumerate(images):
        pixels = drawn[800 * place : 800 * (place + 1)]
        assert pixels.std() > 0.02
        gray = abs(pixels.max(-1) - pixels.min(-1)) < 0.08
        assert (abs(pixels.mean(-1) - background)[gray] > 0.7).sum() > 150, image["alt"]


def shot(browse, page, tmp_path, size, scheme):
    """The (height, width, 3) pixels of a page."""
    file = tmp_path / "shot.png"
    browse(page, f"--screenshot={file}", "--window-size={},{}".format(*size),
           f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}")  # fmt: skip
    return imread(file)[..., :3]
