"""The page in a real browser: every control does what it says, and nothing is loaded or missed."""

import contextlib
import itertools
import json
import pathlib
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from tests.commands import call
from tests.test_report import CONFIG, changed, lines_of, make_run, result

selenium = pytest.importorskip("selenium.webdriver")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), 0
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium: apt install chromium chromium-driver"
)

READY = "return document.body.dataset.ready === 'true'"
MODELS = "Bokeh.documents.flatMap((d) => [...d._all_models.values()])"
FIGURES = f"{MODELS}.filter((m) => m.type === 'Figure')"
CURVES = f"{FIGURES}.flatMap((f) => f.renderers)"


@contextlib.contextmanager
def opened(address, width=1280, dark=False, until=READY):
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(DRIVER))
    try:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(address)
        wait(driver, until)
        yield driver
    finally:
        driver.quit()


def wait(driver, script, seconds=60):
    until = time.monotonic() + seconds
    while not driver.execute_script(script):
        assert time.monotonic() < until, script
        time.sleep(0.1)


def choose(driver, control, value):
    """As a user does it: the value, then the events of the browser."""
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "for (const n of ['input', 'change']) e.dispatchEvent(new Event(n, {bubbles: true}));",
        control,
        str(value),
    )


def complaints(driver):
    return [e["message"] for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def requests(driver):
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in sent if not url.startswith(("data:", "blob:"))]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs of one model, with landmarks, grids, events and a sweep, and one of another."""
    root = tmp_path_factory.mktemp("runs")

    def loss(step):
        return 0.16 + 30 / step + 0.01 * (step // 100 % 2)

    more = {"loss": loss, "update_norm": 0.1, "data_wait": 0.01, "mfu": 0.4, "memory_gb": 12.0}
    lines = [*lines_of(range(100, 10_100, 100), **more)]
    lines += [json.dumps({"step": s, "eval/inception/fid": 2e6 / s}) for s in (5000, 10_000)]
    folders = [
        make_run(root / "a", lines),
        make_run(root / "b", lines[:50], changed(optimizer={"learning_rate": 2e-4})),
        make_run(root / "flow", lines[:20], changed(diffusion={"objective": "flow"})),
    ]
    for folder, steps in ((folders[0], (1000, 2000, 3000)), (folders[1], (1000, 2500))):
        for step in steps:
            shade = np.full((64, 96, 3), step // 20, np.uint8)
            Image.fromarray(shade).save(folder / f"samples/step_{step:07d}.png")
    change = {"step": 400, "change": "config.data.batch_size was 64, is 256"}
    (folders[0] / "config_changes.jsonl").write_text(json.dumps(change) + "\n")
    sweep = [result(folders[0], "ema", s, f) for s, f in ((1.0, 20.0), (1.5, 10.0))]
    for entry in sweep:
        entry["metrics"]["inception_score"] = 50.0
    (folders[0] / "sweep.json").write_text(json.dumps({"sweep": sweep}))
    done = call("dico_jax.report", *folders, f"--out={root}/page.html")
    assert done.returncode == 0, done.stderr
    return (root / "page.html").as_uri()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_without_an_error_and_loads_nothing(page, width, dark):
    with opened(page, width, dark) as driver:
        assert complaints(driver) == []
        assert requests(driver) == [page]
        page_width = "return document.documentElement.scrollWidth"
        assert width - 20 < driver.execute_script(page_width) <= width  # but for a scroll bar
        # Every figure is drawn, inside of the page.
        wait(driver, "return Bokeh.documents.every((d) => d.is_idle)")
        boxes = driver.execute_script(
            "return [...document.querySelectorAll('.plot')]"
            ".map((e) => e.firstElementChild.getBoundingClientRect())"
            ".map((b) => [b.left, b.right, b.height])"
        )
        assert len(boxes) > 15
        for left, right, height in boxes:
            assert 0 <= left < right <= width
            assert height > 100
        back, text, axis = driver.execute_script(
            f"const f = {FIGURES}[0]; return [getComputedStyle(document.body).backgroundColor,"
            "f.title.text_color, f.below[0].major_label_text_color]"
        )
        assert back == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
        assert (text, axis) == (("#e6e8eb", "#a2abb6") if dark else ("#1d2126", "#5c6570"))


def test_every_control_does_what_it_says(page):
    with opened(page) as driver:
        ask = driver.execute_script
        # The axis.
        for value, label in (("images", "images seen"), ("hours", "hours of training")):
            choose(driver, "axis", value)
            assert set(ask(f"return {CURVES}.map((r) => r.glyph.x.field)")) == {value}
            assert set(ask(f"return {FIGURES}.map((f) => f.below[0].axis_label)")) == {label}
        wait(driver, f"return {FIGURES}[0].x_range.end < 1")  # 0.71 hours
        choose(driver, "axis", "step")
        end = f"{FIGURES}[0].x_range.end"  # landmarks go to 400,000, and do not count
        wait(driver, f"return {end} > 9000 && {end} < 11000")
        # Smoothing: of 0.01 up and down from point to point little is left.
        thick = f"{CURVES}.filter((r) => (r.glyph.tags || [])[0] === 'smooth')[0]"
        jump = (
            f"const r = {thick}; const y = r.data_source.data[r.glyph.y.field];"
            "return Math.abs(y[y.length - 1] - y[y.length - 2])"
        )
        choose(driver, "smoothing", 0)
        assert ask(jump) == pytest.approx(0.01, rel=0.01)
        choose(driver, "smoothing", 0.9)
        assert ask(jump) < 0.002
        assert ask("return document.getElementById('smoothing_value').textContent") == "0.90"

        def seen(tag):
            tagged = f"{CURVES}.filter((r) => (r.glyph.tags || []).includes('{tag}'))"
            return set(ask(f"return {tagged}.map((r) => r.visible)"))

        for box, tag in (("raw", "raw"), ("paper", "paper")):
            assert seen(tag) == {True}
            driver.find_element("id", box).click()
            assert seen(tag) == {False}
            driver.find_element("id", box).click()
            assert seen(tag) == {True}
        # Runs.
        drawn = f"return {CURVES}.filter((r) => r.visible).map((r) => r.name)"
        assert {"a", "b", "flow"} <= set(ask(drawn))
        driver.find_element("css selector", "[data-run='1']").click()
        assert "b" not in ask(drawn)
        assert "a" in ask(drawn)
        # Grids: at the last step of any run, then back.
        captions = "return [...document.querySelectorAll('[data-grids]:not([hidden]) figcaption')]"
        captions += ".map((e) => e.textContent)"
        assert ask(captions) == ["a, step 3,000", "b, step 2,500"]
        choose(driver, "grid", 1)
        assert ask(captions) == ["a, step 2,000", "b, step 1,000"]
        assert ask("return document.getElementById('grid_value').textContent") == "2,000"
        shade = (
            "const i = document.querySelector('[data-grids] img'); await i.decode();"
            "const c = document.createElement('canvas').getContext('2d');"
            "c.drawImage(i, 0, 0); return c.getImageData(5, 5, 1, 1).data[0]"
        )
        assert ask(f"return (async () => {{ {shade} }})()") == pytest.approx(100, abs=3)
        assert (
            ask("return document.querySelector('[data-grids] img').alt")
            == "Samples of a, step 2,000"
        )
        # The fields of the config.
        rows = "return [...document.querySelectorAll('#config_table [data-kind]')]"
        rows += ".filter((r) => !r.hidden).map((r) => r.firstElementChild.textContent)"
        assert ask(rows) == ["diffusion.objective", "optimizer.learning_rate"]
        choose(driver, "fields", "changed")
        assert {"logging.wandb_project", "optimizer.learning_rate"} <= set(ask(rows))
        changed_fields = len(ask(rows))
        choose(driver, "fields", "default")
        assert len(ask(rows)) == sum(map(len, CONFIG.values())) > changed_fields
        # The table of weights by guidance.
        tables = "return [...document.querySelectorAll('.sweep')].filter((t) => !t.hidden)"
        tables += ".map((t) => t.dataset.metric)"
        assert ask(tables) == ["fid"]
        choose(driver, "metric", "inception_score")
        assert ask(tables) == ["inception_score"]
        assert complaints(driver) == []
        # What is chosen is in the address: a page that is loaded again shows the same.
        driver.refresh()
        wait(driver, "return document.body.dataset.ready === 'true'")
        assert ask("return document.getElementById('smoothing').value") == "0.9"
        assert "b" not in ask(drawn)
        assert ask(captions) == ["a, step 2,000", "b, step 1,000"]
        assert ask(tables) == ["inception_score"]


def test_a_page_is_used_by_keys_alone(page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    with opened(page) as driver:
        reached = []
        body = driver.find_element(By.TAG_NAME, "body")
        body.send_keys(Keys.TAB)
        wanted = {"axis", "smoothing", "raw", "paper", "grid", "fields", "metric"}
        for _ in range(400):
            focused = driver.switch_to.active_element
            reached.append(focused.get_attribute("id"))
            if focused.get_attribute("id") == "grid":
                outline = focused.value_of_css_property("outline-style")
                assert outline == "solid"
                focused.send_keys(Keys.HOME)
                assert driver.find_element("id", "grid_value").text == "1,000"
                focused.send_keys(Keys.ARROW_RIGHT)
                assert driver.find_element("id", "grid_value").text == "2,000"
            if focused.get_attribute("id") == "raw":
                focused.send_keys(Keys.SPACE)
                assert not focused.is_selected()
            if wanted <= set(reached):
                break
            focused.send_keys(Keys.TAB)
        assert wanted <= set(reached)
        unnamed = driver.execute_script(
            "return [...document.querySelectorAll('input, select')].filter((e) => !e.labels.length)"
            ".length + [...document.querySelectorAll('img:not([hidden])')]"
            ".filter((e) => e.offsetParent && !e.alt).length"
        )
        assert unnamed == 0
        levels = driver.execute_script(
            "return [...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]))"
        )
        assert levels[0] == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_live_follows_a_run_and_says_what_happened_to_it(tmp_path):
    import threading

    from dico_jax.reporting import live
    from dico_jax.training.workdir import workdir_lock

    folder = make_run(tmp_path / "run", lines_of(range(100, 1100, 100)))
    lock = contextlib.ExitStack()
    lock.enter_context(workdir_lock(str(folder)))
    server = live.make_server([folder], [], 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state = "return document.querySelector('.state').textContent"
    try:
        with opened(f"http://127.0.0.1:{server.server_address[1]}/") as driver:
            assert driver.execute_script(state).startswith("running: step 1,000 of 400,000")
            choose(driver, "smoothing", 0.5)
            with (folder / "metrics.jsonl").open("a") as stream:
                stream.writelines(f"{line}\n" for line in lines_of([1100]))
            wait(driver, f"{state}.startsWith('running: step 1,100')")
            wait(driver, "return document.body.dataset.ready === 'true'")
            assert driver.execute_script("return smoothing.value") == "0.5"
            lock.close()  # as the kernel does it where a process is killed
            wait(driver, f"{state}.includes('ended before its last step: killed')")
            server.shutdown()
            server.server_close()
            wait(driver, "return document.getElementById('live').textContent.includes('has ended')")
            assert driver.execute_script(state).startswith("ended before its last step")
    finally:
        lock.close()
        server.server_close()


@pytest.mark.slow  # it trains
def test_the_page_of_a_digits_run(tmp_path):
    """A run as it is trained, not as a test writes it."""
    small = ["--config.training.num_steps=20", "--config.training.checkpoint_every_steps=10"]
    small += ["--config.training.log_every_steps=5", "--config.sampling.grid_every_steps=20"]
    small += ["--config.sampling.num_steps=2", "--config.eval.class_agreement_samples=0"]
    small += ["--config.sampling.grid_rows=2", "--config.sampling.grid_columns=2"]
    workdir = f"--workdir={tmp_path}/run"
    done = call("dico_jax.main", "--config=configs/digits.py", workdir, *small)
    assert done.returncode == 0, done.stderr
    assert call("dico_jax.report", tmp_path / "run").returncode == 0
    with opened(pathlib.Path(tmp_path / "run/report.html").as_uri(), 390) as driver:
        assert complaints(driver) == []
        text = driver.find_element("tag name", "body").text
        assert "finished: step 20 of 20" in text
        assert "Checkpoints kept: 10, 20" in text
        captions = [e.text for e in driver.find_elements("tag name", "figcaption")]
        assert captions == ["run, step 20"]
