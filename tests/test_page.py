"""The page, in a real browser: no errors, charts drawn, filters and sorting work, and text of others stays text."""

import json
import shutil

import pytest

from engine.spec import UsageError
from page import __main__ as page

pytest.importorskip("altair", reason="pip install -e .[page]")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e .[test]")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "<script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    run = folder / "x" / EVIL.replace("/", "∕")
    run.mkdir(parents=True)
    events = [{"event": "train", "step": i, "loss": 5 / i, "train_time": i} for i in range(1, 9)]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, events)))
    said = page.run(["--runs", str(run), "--out", str(folder / "index.html")])
    assert said.startswith(f"wrote {folder / 'index.html'}")
    with pytest.raises(UsageError, match="holds no log"):
        page.page([folder])
    return folder / "index.html"


@pytest.mark.slow
def test_its_size_and_its_links(written):
    text = written.read_text()
    assert len(text.encode()) < 6e6 and "http-equiv" not in text and 'src="http' not in text and 'href="http' not in text
    assert EVIL not in text and "\\u003cscript>" in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [360, 1600])
def test_in_a_browser(written, width):
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab, errors = browser.new_page(viewport={"width": width, "height": 900}), []
        tab.on("console", lambda message: message.type in ("error", "warning") and errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(written.as_uri())
        for place in tab.query_selector_all(".chart"):
            place.scroll_into_view_if_needed()
            tab.wait_for_selector(f"#{place.get_attribute('id')} svg")
        marks = "all => all.map(c => c.querySelectorAll('svg .mark-symbol path, svg .mark-line path').length)"
        drawn = tab.eval_on_selector_all(".chart", marks)
        assert len(drawn) == 8 and min(drawn) > 0
        assert tab.title() == "NanoGPT speedrun"
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        names = "[...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[1].textContent)"
        before = tab.evaluate(names)
        tab.focus("table.sortable th:nth-child(2) button")
        tab.keyboard.press("Enter")
        assert tab.evaluate(names) == sorted(before) != before
        assert tab.get_attribute("table.sortable th:nth-child(2)", "aria-sort") == "ascending"
        path = "document.querySelector('#losses svg .mark-line path').getAttribute('d')"
        old = tab.evaluate(path)
        tab.check("#losses input[value=step]")
        tab.wait_for_function(f"{path} !== {json.dumps(old)}")
        for link in tab.query_selector_all("nav a"):
            assert tab.query_selector(link.get_attribute("href"))
        described = "all => all.map(c => Boolean(c.querySelector('[aria-label]')))"
        assert all(tab.eval_on_selector_all(".chart", described))
        browser.close()
    assert errors == []
