"""The page of checkpoints in a real browser: every control does what it says."""

import base64
import io
import json
import re
import time
import urllib.parse

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from dico_jax.playground.pictures import KEY
from dico_jax.sampling.sampler import Sampler
from tests.commands import call
from tests.test_app import checkpoints, served  # noqa: F401  a fixture
from tests.test_report_browser import complaints, opened, pytestmark, requests, wait

__all__ = ["pytestmark"]
READY = "return !!document.getElementById('make')"
DONE = "return !!document.querySelector('#shown .again')"


@pytest.fixture(scope="module")
def address(checkpoints):  # noqa: F811
    with served(*(f"--ckpt={path}" for path in checkpoints), "--max_images=4") as found:
        yield found


def field(driver, control, which="input"):
    return driver.find_element(By.CSS_SELECTOR, f"#{control} {which}")


def type_in(driver, control, text):
    """As a user does it: all that is there is replaced."""
    box = field(driver, control, "input[type=number]")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(str(text), Keys.TAB)


def pick(driver, control, *names):
    """Searches a list for names, and takes them."""
    box = field(driver, control)
    for name in names:
        box.click()
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(name)
        wait(driver, f"return document.querySelectorAll('#{control} [role=option]').length === 1")
        box.send_keys(Keys.ENTER)
    box.send_keys(Keys.ESCAPE)


def mode(driver, name):
    field(driver, "do", f"input[value={name}]").click()


def make(driver, until=DONE):
    driver.execute_script("document.querySelector('#shown .made')?.remove()")
    driver.find_element(By.ID, "make").click()
    wait(driver, until, 120)


def pictures(driver):
    """The files that are shown: how they were made, and their pixels."""
    found = driver.execute_script(
        "return [...document.querySelectorAll('#shown figure img')].map((e) => e.src)"
    )
    opened_ = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in found]
    return [json.loads(image.text[KEY]) for image in opened_], np.stack(opened_)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_without_an_error_and_loads_nothing_from_elsewhere(address, width, dark):
    with opened(address, width, dark, READY) as driver:
        make(driver)
        for name in ("Compare", "Walk"):
            mode(driver, name)
            time.sleep(0.5)
            page_width = driver.execute_script("return document.documentElement.scrollWidth")
            assert width - 20 < page_width <= width
        assert complaints(driver) == []
        assert [url for url in requests(driver) if not url.startswith(address)] == []
        assert len(pictures(driver)[0]) == 4
        body, text = driver.execute_script(
            "const s = getComputedStyle(document.querySelector('#shown p'));"
            "return [getComputedStyle(document.body).backgroundColor, s.color]"
        )
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (body, text)]
        assert light[1] - light[0] > 150 if dark else light[0] - light[1] > 150


def test_every_control_does_what_it_says(address, checkpoints):  # noqa: F811
    sampler = Sampler.from_pretrained(checkpoints[0])
    with opened(address, until=READY) as driver:
        pick(driver, "told", "kind 3", "kind 7")
        for control, value in (("number", 3), ("seed", 5), ("cfg_scale", 3), ("steps", 6)):
            type_in(driver, control, value)
        pick(driver, "solver", "ddim")
        make(driver)
        about, images = pictures(driver)
        how = {"seed": 5, "num_images": 3, "steps": 6, "cfg_scale": 3.0, "solver": "ddim"}
        wanted = sampler(classes=[3, 7], **how)[..., 0]
        assert np.abs(images.astype(int) - wanted).max() <= 1
        assert [one["of"] for one in about] == ["kind 3", "kind 7", "kind 3"]
        # The link makes them again, in a page of its own.
        link = driver.find_element(By.CSS_SELECTOR, "#shown .again").get_attribute("href")
        assert urllib.parse.parse_qs(urllib.parse.urlsplit(link).query)["solver"] == ["ddim"]
        driver.get(link)
        wait(driver, DONE, 120)
        np.testing.assert_array_equal(pictures(driver)[1], images)
        assert field(driver, "seed").get_attribute("value") == "5"
        # The other checkpoint beside it.
        mode(driver, "Compare")
        wait(driver, "return !!document.querySelector('#checkpoint_2')")
        type_in(driver, "steps_2", 6)
        make(driver)
        about, both = pictures(driver)
        assert [one["checkpoint"] for one in about] == ["one"] * 3 + ["two"] * 3
        np.testing.assert_array_equal(both[:3], images)
        # A walk, and a slider along it.
        mode(driver, "Walk")
        wait(driver, "return !!document.querySelector('#to')")
        pick(driver, "to", "kind 1")
        type_in(driver, "to_seed", 5)
        make(driver)
        about, walked = pictures(driver)
        assert about[-1]["walk"] == {"seeds": [5, 5], "from": 3, "to": 1, "share": 1.0}
        np.testing.assert_array_equal(walked[0], images[0])
        field(driver, "shown", "input[type=range]").send_keys(Keys.HOME)
        same = "return document.querySelector('.large').src === "
        assert driver.execute_script(f"{same}document.querySelector('figure img').src")
        # Another seed at a click.
        mode(driver, "Make")
        driver.execute_script("document.querySelector('#shown .made').remove()")
        driver.find_element(By.ID, "again").click()
        wait(driver, DONE, 120)
        assert pictures(driver)[0][0]["seed"] == int(field(driver, "seed").get_attribute("value"))
        assert (pictures(driver)[1] != images).any()
        # The file that is kept is the picture that is shown.
        name, file = driver.execute_script(
            "const a = document.querySelector('#shown figure a'); let kept;"
            "a.addEventListener('click', (e) => { e.preventDefault(); kept = a.href; });"
            "a.click(); return [a.download, kept];"
        )
        assert name == "one_000.png"
        assert file == driver.execute_script("return document.querySelector('figure img').src")
        assert complaints(driver) == []


def test_keys_are_enough(address):
    with opened(address, until=READY) as driver:
        field(driver, "told").send_keys("kind 4", Keys.ENTER, Keys.ESCAPE)
        for _ in range(40):
            ActionChains(driver).send_keys(Keys.TAB).perform()
            if driver.switch_to.active_element.get_attribute("id") == "make":
                break
        ActionChains(driver).send_keys(Keys.ENTER).perform()
        wait(driver, DONE, 120)
        assert {one["of"] for one in pictures(driver)[0]} == {"kind 4"}


def test_what_is_wrong_is_said_and_can_be_mended(address):
    with opened(address, until=READY) as driver:
        type_in(driver, "number", 1)
        type_in(driver, "seed", -3)
        make(driver, "return !!document.querySelector('#shown [role=alert]')")
        assert "seed=-3 must be" in driver.find_element(By.ID, "shown").text
        type_in(driver, "seed", 3)
        make(driver)
        driver.get(f"{address}?seed=5&steps=99999999")
        wait(driver, "return !!document.querySelector('#shown [role=alert]')")
        assert "steps=99999999 must be at most 250" in driver.find_element(By.ID, "shown").text
        driver.get(f"{address}?told=3&number=1&weights=12345678")
        wait(driver, DONE, 120)
        assert "other weights" in driver.find_element(By.TAG_NAME, "body").text


def test_two_tabs_have_pictures_of_their_own(address):
    with opened(f"{address}?told=3&number=1", until=READY) as driver:
        driver.switch_to.new_window("tab")
        driver.get(f"{address}?told=8&number=1")
        for tab, of in zip(driver.window_handles, ("kind 3", "kind 8"), strict=True):
            driver.switch_to.window(tab)
            wait(driver, DONE, 120)
            assert [one["of"] for one in pictures(driver)[0]] == [of]


@pytest.mark.slow  # it trains for two minutes
def test_the_page_of_a_digits_run(tmp_path):
    """What is asked for is what a person sees, by a judge of the real digits."""
    datasets, svm = pytest.importorskip("sklearn.datasets"), pytest.importorskip("sklearn.svm")
    short = ["training.num_steps=500", "training.checkpoint_every_steps=500"]
    short += ["sampling.grid_every_steps=0", "eval.class_agreement_samples=0"]
    options = [f"--config.{field}" for field in short]
    run = tmp_path / "run"
    done = call("dico_jax.main", "--config=configs/digits.py", f"--workdir={run}", *options)
    assert done.returncode == 0, done.stderr
    real, kinds = datasets.load_digits(return_X_y=True)
    judge = svm.SVC(C=10.0, gamma="scale").fit(np.round(real / 16 * 255), kinds)
    with served(f"--ckpt={run}", "--steps=20") as page, opened(page, until=READY) as driver:
        pick(driver, "told", "3", "8")
        type_in(driver, "number", 16)
        make(driver)
        about, images = pictures(driver)
        seen = judge.predict(images.reshape(len(images), -1))
        assert [one["of"] for one in about] == ["3", "8"] * 8
        assert np.mean(seen == [3, 8] * 8) >= 0.8, seen
        assert about[0]["step"] == 500
        mode(driver, "Compare")
        wait(driver, "return !!document.querySelector('#cfg_scale_2')")
        type_in(driver, "cfg_scale_2", 1)
        type_in(driver, "number", 4)
        make(driver)
        about, both = pictures(driver)
        assert [one["sampling"]["cfg_scale"] for one in about] == [1.4] * 4 + [1.0] * 4
        assert (both[:4] != both[4:]).any()
        mode(driver, "Walk")
        wait(driver, "return !!document.querySelector('#to')")
        pick(driver, "to", "1")
        make(driver)
        _, walked = pictures(driver)
        ends = judge.predict(walked[[0, -1]].reshape(2, -1))
        assert ends.tolist() == [3, 1]
        assert complaints(driver) == []
