"""The page of --html: what it says, and how it looks and works in a real browser."""

import base64
import copy
import html.parser
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading

import pytest
from unilabel.conformance.html import html as page_of
from unilabel.conformance.report import QUANTITIES, passed, smallest_failures

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
]  # fmt: skip
DESKTOP, PHONE = (1280, 900), (390, 844)
TIMEOUT = 300.0  # seconds for all that these tests do with the browser


class Browser:
    """Chromium with one page, told what to do through pipes: the DevTools protocol, messages ending in a zero byte."""

    def __init__(self, folder):
        names = ("chromium", "chromium-browser", "google-chrome")
        path = next(filter(None, map(shutil.which, names)), None)
        assert path, f"the page is tested in a browser: install one of {', '.join(names)} (apt-get install chromium)"
        ends = [str(folder / "in"), str(folder / "out")]
        for end in ends:
            os.mkfifo(end)
        # The browser reads from descriptor 3 and writes to 4.
        script = 'there=$1 back=$2; shift 2; exec "$@" 3<"$there" 4>"$back"'
        arguments = [path, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", script, "sh", *ends, *arguments], stdout=log, stderr=log, start_new_session=True
            )
        self.watch = threading.Timer(TIMEOUT, self.kill)
        self.watch.start()
        self.there, self.back = open(ends[0], "wb"), open(ends[1], "rb")  # noqa: SIM115
        self.log, self.events, self.count, self.session = folder / "log", [], 0, None
        page = next(target for target in self.call("Target.getTargets")["targetInfos"] if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)

    def close(self):
        self.watch.cancel()
        self.kill()
        self.process.wait()
        self.there.close()
        self.back.close()

    def receive(self):
        message = b""
        while not message.endswith(b"\0"):
            byte = self.back.read(1)
            assert byte, f"the browser ended:\n{self.log.read_text()}"
            message += byte
        return json.loads(message[:-1])

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        self.there.write(json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        self.there.flush()
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file, size=DESKTOP, scheme="light", script=True):
        self.events.clear()
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=size == PHONE,
        )
        self.call("Page.navigate", url=file.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def run(self, expression):
        """The value of JavaScript, as JSON has it."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def press(self, key, text=""):
        codes = {"Tab": 9, "Enter": 13, "ArrowDown": 40}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                **({"text": text} if text and kind == "keyDown" else {}),
            )
        # What a key does, such as a change of a <select>, is done in a task of its own.
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")

    def screenshot(self, file):
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the command writes: the frameworks' own losses fail in every way, some by an error."""
    folder = tmp_path_factory.mktemp("native")
    chosen = ["--subject", "native", "--backend", "numpy", "--backend", "torch", "--dtype", "float32"]
    chosen += ["--dtype", "bfloat16", "--case", "seed", "--case", "confident", "--case", "masked", "--case", "invalid"]
    files = ["--json", str(folder / "native.json"), "--html", str(folder / "native.html")]
    command = [sys.executable, "-m", "unilabel.conformance", "conformance", *chosen, *files]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return folder / "native.html"


@pytest.fixture(scope="module")
def found(page):
    found = json.loads(page.with_suffix(".json").read_text())
    assert page.read_text(encoding="utf-8") == page_of(found)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


class Reader(html.parser.HTMLParser):
    """The tags of a page, and its words; fails on a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in ("meta", "link") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data if self.open and self.open[-1] not in ("script", "style") else ""


def count(found, status):
    return sum(case["status"] == status for run in found["runs"] for case in run["cases"])


# --- What it says -----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_headline(found):
    words = Reader(page_of(found)).words
    wrong, right = count(found, "fail"), count(found, "pass")
    assert f"✗ {wrong:,} of {wrong + right:,} answers do not match the oracle" in words
    for run in found["runs"]:
        assert run["title"] in words
        assert run["version"] in words
        left_out = sum(case["status"] == "not applicable" for case in run["cases"])
        assert not left_out or f"{run['title']}: {left_out:,} answers are not applicable" in words
    assert "Not asked for: float16, float64." in words
    assert "Cases that match none of seed confident masked invalid." in words
    assert "The large cases, which --full runs." in words


@pytest.mark.full
def test_smallest_input_first(found):
    """Of each flag and column, the case in view is the one that the terminal shows; all others are there, folded."""
    page = page_of(found)
    sections = re.findall(r'<section class="group">.*?</section>', page, re.DOTALL)
    for section in sections:
        flag = re.search("<h3>(.*?)</h3>", section)[1]
        assert found["flags"].get(flag, "") in section
        for block in section.split('<div class="block">')[1:]:
            run = found["runs"][int(re.search(r'data-column="(\d+)"', block)[1])]
            shown = re.findall('data-case="(.*?)"', block)
            failed = [
                case for case in run["cases"] if case["status"] == "fail" and flag in (case["flags"] or ["other"])
            ]
            assert shown[0] == smallest_failures(run)[flag]["id"]
            assert sorted(shown) == sorted(case["id"] for case in failed)
            sizes = {case["id"]: case["size"] for case in failed}
            assert [sizes[name] for name in shown] == sorted(sizes.values())
    words = Reader(page).words
    for run in found["runs"]:
        for case in run["cases"]:
            assert case["call"] in words
            assert case["reason"] in words
            for verdict in case["verdicts"].values():
                assert verdict.get("got", "") in words
                assert verdict.get("right", "") in words


@pytest.mark.full
def test_all_pass(found):
    right = copy.deepcopy(found)
    for run in right["runs"]:
        run["cases"] = [case for case in run["cases"] if case["status"] == "pass"]
    right["passed"] = passed(right)
    words = Reader(page_of(right)).words
    assert f"✓ All {count(right, 'pass')} answers match the oracle" in words
    assert "✗ unilabel" not in words
    assert "What failed" not in words


@pytest.mark.full
def test_nothing_applies(found):
    """No failure, but no tick either."""
    none = copy.deepcopy(found)
    for run in none["runs"]:
        run["cases"] = [case for case in run["cases"] if case["status"] == "not applicable"]
    none["passed"] = passed(none)
    page = page_of(none)
    assert "✗ Nothing was checked" in Reader(page).words
    assert "✓ All" not in page
    assert "<title>✗" in page


def without_torch(found):
    """Nothing of torch, all but one of NumPy, and that is right."""
    missing = copy.deepcopy(found) | {"interrupted": True}
    numpy, torch = missing["runs"]
    numpy["cases"] = [case for case in numpy["cases"] if case["status"] != "fail"]
    numpy["cases"][0] |= {"status": "not run", "verdicts": {}, "numbers": {}}
    torch |= {"problem": "not installed: pip install 'unilabel[torch]'", "version": "", "device": ""}
    for case in torch["cases"]:
        case |= {"status": "not run", "reason": "", "call": "", "verdicts": {}, "numbers": {}}
    return missing | {"passed": passed(missing)}


@pytest.mark.full
def test_missing_and_interrupted(found):
    page = page_of(without_torch(found))
    words = Reader(page).words
    assert "✗ Not everything was checked" in words
    assert "Interrupted: this is what there was by then." in words
    assert "native torch: not installed: pip install 'unilabel[torch]'" in words
    for row in re.findall(r'<th scope="row">\w+</th><td class="first">.*?</tr>', page):
        torch = row.split('<td class="first">')[2]
        assert torch.startswith('<span class="none">not run</span>'), row
    assert (
        '<th scope="row">seed</th><td class="first"><span class="none">not run</span>' in page
    )  # of NumPy, one is not


@pytest.mark.full
def test_errors_alone(found):
    """A family that has no numbers to compare fails, and says why."""
    errors = copy.deepcopy(found)
    torch = errors["runs"][1]
    torch["cases"] = [case for case in torch["cases"] if case["family"] != "invalid" or case["reason"]]
    count = sum(case["status"] == "fail" for case in torch["cases"] if case["family"] == "invalid")
    assert count
    page = page_of(errors)
    gradient = re.search(rf">error<small>{count}/{count} ✗</small></a></td><td>(.*?)</td>", page)[1]
    assert gradient == '<span class="none">–</span>'  # it applies, but nothing came


HOSTILE = """'"><script>document.title = 'hacked'</script>&lt;"""


def hostile(found):
    """Every text that a framework, a command line or somebody's function has a say in."""
    bad = copy.deepcopy(found) | {"patterns": [HOSTILE], "dtypes": [HOSTILE], "flags": {HOSTILE: HOSTILE}}
    for run in bad["runs"]:
        run |= {"title": HOSTILE, "subject": HOSTILE, "version": HOSTILE, "device": HOSTILE, "problem": HOSTILE}
        for i, case in enumerate(run["cases"]):
            case |= {"id": f"{HOSTILE}{i}", "family": HOSTILE, "dtype": HOSTILE, "flags": [HOSTILE], "reason": HOSTILE}
            case["call"] = case["call"] and HOSTILE
            for verdict in case["verdicts"].values():
                verdict |= {name: HOSTILE for name in ("how", "got", "right") if name in verdict}
    return bad


@pytest.mark.full
def test_escapes(found):
    page = page_of(hostile(found))
    assert "<script>document" not in page
    assert [tag for tag, _ in Reader(page).tags].count("script") == 1
    assert HOSTILE in Reader(page).words


@pytest.mark.full
def test_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    for tag, attributes in Reader(text).tags:
        assert "src" not in attributes, tag
        assert attributes.get("href", "#cases") in ("#cases", "data:,"), attributes
    assert not re.search(r"https?://|url\(|@import", text)


@pytest.mark.full
def test_browser_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssertionError, match="apt-get install chromium"):
        Browser(tmp_path)


# --- How it looks -----------------------------------------------------------------------------------------------------


def complaints(browser):
    """Errors and warnings of the page, and what it asked of the network."""
    browser.run("1")  # what came before is in
    found = [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    found += [event for event in browser.events if event["method"] == "Runtime.consoleAPICalled"]
    sent = [event for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    urls = [event["params"]["request"]["url"] for event in sent]
    return found, [url for url in urls if url != "data:,"]


# The least contrast of text and its ground, as WCAG has it, and where.
CONTRAST = """(() => {
  const parse = color => color.match(/[\\d.]+/g).map(Number)
  const light = color => {
    const [r, g, b] = parse(color).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const ground = element => {
    const color = getComputedStyle(element).backgroundColor
    const solid = (parse(color)[3] ?? 1) == 1 || !element.parentElement
    return solid ? color : ground(element.parentElement)
  }
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  let least = [99, '']
  while (words.nextNode()) {
    const element = words.currentNode.parentElement
    if (!words.currentNode.data.trim() || !element.checkVisibility()) continue
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))]
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)
    if (contrast < least[0]) least = [contrast, element.outerHTML.slice(0, 200)]
  }
  return least
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("which", ["native", "missing", "hostile"])
def test_looks(browser, found, tmp_path, size, scheme, which):
    """It fits, is readable, says no error and loads nothing."""
    file = tmp_path / "page.html"
    shown = {"native": lambda found: found, "missing": without_torch, "hostile": hostile}[which](found)
    file.write_text(page_of(shown), encoding="utf-8")
    browser.open(file, size, scheme)
    browser.run("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert browser.run("innerWidth") == size[0]
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    dark = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128")
    assert dark == (scheme == "dark")
    contrast, where = browser.run(CONTRAST)
    assert contrast >= 4.5, where
    assert browser.run("document.title").endswith("unilabel conformance")
    browser.screenshot(tmp_path / "shot.png")
    picture = (tmp_path / "shot.png").read_bytes()
    assert struct.unpack(">4s2I", picture[12:24]) == (b"IHDR", *size)
    assert len(picture) > 10_000  # an empty page compresses to less
    assert complaints(browser) == ([], [file.as_uri()])


def test_phone_table_scrolls_inside(browser, found, tmp_path):
    """Family names stay in sight, and a finger hits a cell."""
    file = tmp_path / "page.html"
    file.write_text(page_of(found | {"runs": found["runs"] * 2}), encoding="utf-8")
    browser.open(file, PHONE)
    scrolled = browser.run(
        "(box => { box.scrollLeft = 200; return box.scrollLeft })(document.querySelector('.map').parentElement)"
    )
    assert scrolled == 200
    assert browser.run("document.querySelector('.map [scope=row]').getBoundingClientRect().left") >= 0
    assert browser.run("Math.min(...[...document.querySelectorAll('.map a')].map(cell => cell.offsetHeight))") >= 40


def test_counts_stay_in_view(browser, found, tmp_path):
    """On a small phone, whatever the subject is called."""
    found = copy.deepcopy(found)
    found["runs"][0]["title"] = "a_package.losses.functional:binary_cross_entropy_with_logits numpy"
    file = tmp_path / "page.html"
    file.write_text(page_of(found), encoding="utf-8")
    browser.open(file, (360, 640))
    ends = browser.run("[...document.querySelectorAll('.sides td.number')].map(n => n.getBoundingClientRect().right)")
    assert len(ends) == 4 * len(found["runs"])
    assert max(ends) <= 360
    assert browser.run("document.documentElement.scrollWidth <= 360")


def test_without_script(browser, page):
    """All is there to read, and no filter that would not work."""
    browser.open(page, script=False)
    assert browser.run("document.querySelector('.filters').checkVisibility()") is False
    assert browser.run(
        "[...document.querySelectorAll('.block')].every(block => block.querySelector('li').checkVisibility())"
    )
    browser.call("Emulation.setScriptExecutionDisabled", value=False)


# --- How it works -----------------------------------------------------------------------------------------------------

SHOWN = """[...document.querySelectorAll('[data-case]')].filter(row => !row.hidden)
  .map(row => [row.dataset.column, row.dataset.case].join(' '))"""


def expected(found, **wanted):
    """The answers that filters leave."""
    answers = set()
    for i, run in enumerate(found["runs"]):
        for case in run["cases"]:
            wrong = [name for name, verdict in case["verdicts"].items() if "how" in verdict]
            has = {
                "column": [str(i)],
                "family": [case["family"]],
                "dtype": [case["dtype"]],
                "status": [case["status"]],
                "flag": case["flags"] or ["other"],
                "quantity": (wrong or ["value"]) if case["status"] == "fail" else list(case["verdicts"]),
            }
            if all(value in has[name] for name, value in wanted.items()):
                answers.add(f"{i} {case['id']}")
    return answers


def test_each_filter(browser, found, page):
    browser.open(page)
    assert set(browser.run(SHOWN)) == expected(found)
    options = browser.run(
        "[...document.querySelectorAll('select')].flatMap(s => [...s.options].map(o => [s.name, o.value]))"
    )
    assert {name for name, _ in options} == {"column", "family", "quantity", "flag", "dtype", "status"}
    for name, value in options:
        change = f"document.querySelector('[name={name}]').value = {json.dumps(value)}"
        browser.run(f"{change}; document.querySelector('form').dispatchEvent(new Event('change'))")
        wanted = expected(found, **{name: value} if value else {})
        assert set(browser.run(SHOWN)) == wanted, (name, value)
        # Whatever failed and is shown, the smallest of a block is not folded away.
        assert browser.run("""[...document.querySelectorAll('.block')].every(block => {
          const shown = [...block.querySelectorAll('li')].filter(item => !item.hidden)
          return shown.length ? shown[0].checkVisibility() : !block.checkVisibility()
        })""")
        browser.run(f"document.querySelector('[name={name}]').value = ''")
    assert complaints(browser)[0] == []


def test_each_cell(browser, found, page):
    """A cell leads to as many failures as it says."""
    browser.open(page)
    cells = browser.run("[...document.querySelectorAll('.map a')].map(cell => [{...cell.dataset}, cell.innerText])")
    assert len(cells) > 10
    for i, (wanted, text) in enumerate(cells):
        browser.run("document.querySelector('[name=status]').value = 'pass'")  # a cell starts afresh
        browser.run(f"document.querySelectorAll('.map a')[{i}].click()")
        failed = expected(found, **wanted, status="fail")
        assert f"{len(failed)}/" in text
        assert set(browser.run(SHOWN)) == expected(found, **wanted)
        assert browser.run("document.querySelector('output').textContent").startswith(f"{len(failed)} wrong")
        assert browser.run("[...document.querySelectorAll('.map a[aria-current=true]')].length") == 1
    named = {(*wanted.values(),) for wanted, _ in cells}
    for column in range(len(found["runs"])):
        for family in {case["family"] for case in found["runs"][column]["cases"]}:
            for quantity in QUANTITIES:
                place = {"column": str(column), "family": family, "quantity": quantity}
                is_cell = any(set(place.values()) == set(name) for name in named)
                assert is_cell == bool(expected(found, **place, status="fail")), place


FOCUS = """(() => {
  const e = document.activeElement, s = getComputedStyle(e)
  const visible = e.matches(':focus-visible') && s.outlineStyle != 'none' && parseFloat(s.outlineWidth) >= 2
  return [e.name || e.className || e.tagName, e.closest('.map') ? 'cell' : '', visible, {...e.dataset}]
})()"""


def test_keyboard(browser, found, page):
    browser.open(page)
    stops = []
    while not stops or stops[-1][0] != "status":
        browser.press("Tab")
        stops.append(browser.run(FOCUS))
        assert stops[-1][2], f"the focus cannot be seen on {stops[-1]}"
        assert len(stops) < 100, stops
    names = [name for name, *_ in stops]
    assert sum(cell == "cell" for _, cell, *_ in stops) == browser.run("document.querySelectorAll('.map a').length")
    assert names[-6:] == ["column", "family", "quantity", "flag", "dtype", "status"]

    browser.open(page)  # again from the top, to a cell, and through it to the filters
    while not (stop := browser.run(FOCUS))[1]:
        browser.press("Tab")
    browser.press("Enter", "\r")
    assert set(browser.run(SHOWN)) == expected(found, **stop[3])
    assert browser.run("document.querySelector('#cases').getBoundingClientRect().top") < 50
    browser.press("Tab")
    assert browser.run(FOCUS)[0] == "column"
    for _ in range(4):
        browser.press("Tab")
    browser.press("ArrowDown")
    assert browser.run("document.activeElement.value") == "float32"
    assert set(browser.run(SHOWN)) == expected(found, **stop[3], dtype="float32")
    for _ in range(2):
        browser.press("Tab")
    browser.press("Enter", "\r")  # show all
    assert set(browser.run(SHOWN)) == expected(found)
    assert complaints(browser)[0] == []
