"""A report in Chromium, without a network: no error, and slider, pointer and switch do what they say."""

import shutil

import pytest
import torch

from minegan_fast.finetune import Selection
from minegan_fast.report import Facts, page
from minegan_fast.training.plots import save_grid

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its chromedriver"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of selenium's own
]

HISTORY = [
    {"step": step, "stage": "mining" if step else "source", "kid": 0.123456 / (step + 1), "kid_train": 0.5 / (step + 1)}
    for step in range(0, 30, 10)
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (
        "headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "window-size=1200,1000", f"user-data-dir={folder / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def shown(driver, tmp_path):
    """The page, opened; afterwards nothing may have been said in the console."""
    for number, row in enumerate(HISTORY):
        save_grid(tmp_path / f"{row['step']}.png", torch.full((4, 1, 8, 8), number / 3))
    selection = Selection({"first": torch.tensor([0, 1, 3])}, {"first": (4, 2), "second": (8, 2)})
    facts = Facts("<script>throw 1</script>", HISTORY, {0: "source", 20: "last, best"}, 20, "pixels")
    facts.grids = {row["step"]: tmp_path / f"{row['step']}.png" for row in HISTORY}
    facts.selection = selection
    (tmp_path / "report.html").write_text(page(facts), encoding="utf-8")
    driver.get((tmp_path / "report.html").as_uri())
    yield driver
    assert driver.get_log("browser") == []


def find(driver, selector: str):
    return driver.find_elements("css selector", selector)


def point_at(driver, element, share: float) -> None:
    """Moves the pointer to a share of an element's width."""
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    across = round((share - 0.5) * element.size["width"])
    webdriver.ActionChains(driver).move_to_element_with_offset(element, across, 0).perform()


def test_the_slider_shows_the_grid_of_a_step(shown):
    slider, picture = find(shown, "#step")[0], find(shown, "#shown")[0]
    assert find(shown, "#shown-step")[0].text == "20, last, best"
    sources = [picture.get_attribute("src")]
    for label in ("10, mining", "0, source"):
        slider.send_keys(webdriver.Keys.ARROW_LEFT)
        assert find(shown, "#shown-step")[0].text == label
        sources.append(picture.get_attribute("src"))
    named = [image.get_attribute("src") for image in find(shown, ".grids img")]
    assert [sources[2], sources[0]] == named
    assert len(set(sources)) == 3
    assert shown.execute_script("return arguments[0].naturalWidth", picture) > 0


def test_a_pointer_over_a_curve_reads_its_values(shown):
    chart = find(shown, ".chart")[0]
    plot, values = chart.find_element("css selector", ".plot"), chart.find_element("css selector", ".values")
    point_at(shown, plot, 0.98)
    assert values.text == "step 20: held-out images 0.0058789, training images 0.02381"
    point_at(shown, plot, 0.02)
    assert values.text == "step 0: held-out images 0.12346, training images 0.5"
    assert chart.find_element("css selector", ".line").is_displayed()
    webdriver.ActionChains(shown).move_to_element(find(shown, "h1")[0]).perform()
    assert values.text == ""
    chart.send_keys(webdriver.Keys.ARROW_RIGHT)
    assert values.text.startswith("step 10: ")


def test_a_pointer_over_a_layer_names_the_channel(shown):
    first, second = find(shown, "tr.layer svg")
    point_at(shown, first, 0.6)
    assert find(shown, "#neuron")[0].text == "first, channel 2: frozen"
    point_at(shown, first, 0.9)
    assert find(shown, "#neuron")[0].text == "first, channel 3: trains"
    point_at(shown, second, 0.9)
    assert find(shown, "#neuron")[0].text == "second, channel 7: frozen"


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_dark_and_light(shown, scheme):
    def back() -> str:
        return shown.execute_script("return getComputedStyle(document.body).backgroundColor")

    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 28)"}
    wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    assert back() == colours.pop(scheme)
    find(shown, "#theme")[0].click()
    assert [back()] == [*colours.values()]
    find(shown, "#theme")[0].click()
    assert [back()] != [*colours.values()]


def test_only_the_pages_own_script_runs(driver, tmp_path):
    text = page(Facts("run", HISTORY, {0: "source"}, 0)).replace("<main>", "<main><script>document.title = 1</script>")
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    driver.get((tmp_path / "report.html").as_uri())
    assert driver.title == "run"
    assert "Content Security Policy" in driver.get_log("browser")[0]["message"]
