"""The report in a real browser: it works by pointer and key, fits a phone, runs no other script, asks for nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SIZES = ((360, 740), (1280, 900))
Opened = Callable[..., Any]
Screenshot = Callable[..., bytes]


def column(page: Any, place: int) -> list[str]:
    """Cells of the contestants in the first table."""
    cells = page.locator(f"#scores tbody.contestants tr > :nth-child({place})")
    return [text.strip() for text in cells.all_inner_texts()]


def cut(page: Any, place: int = 0) -> float:
    return float(
        page.locator(".stage").nth(place).evaluate("stage => parseFloat(stage.style.getPropertyValue('--cut'))")
    )


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_is_seen(
    opened: Opened, screenshot: Screenshot, tmp_path: Path, width: int, height: int, scheme: str
) -> None:
    with opened(width, height, color_scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        screenshot(page, path=tmp_path / f"{width}-{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        beyond = page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter((part) => {
                 if (part.closest(".scroll, nav, .stage, svg") || !part.offsetWidth) return false;
                 const box = part.getBoundingClientRect();
                 return box.left < -1 || box.right > innerWidth + 1;
               }).map((part) => part.outerHTML.slice(0, 120))"""
        )
        assert beyond == []
        clipped = page.evaluate(
            """() => [...document.querySelectorAll(".value, .delta, .chip, dd, h1, h2, h3, figcaption")]
                 .filter((part) => getComputedStyle(part).display !== "inline")
                 .filter((part) => part.scrollWidth > part.clientWidth + 1)
                 .map((part) => part.outerHTML.slice(0, 120))"""
        )
        assert clipped == []
        outside = page.evaluate(
            """() => [...document.querySelectorAll("svg text")].filter((text) => {
                 const [inner, outer] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
                 return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
               }).map((text) => text.outerHTML)"""
        )
        assert outside == []
    assert (tmp_path / f"{width}-{scheme}.png").stat().st_size > 50_000


def test_names_run_nothing(opened: Opened, hostile: tuple[str, str]) -> None:
    title, name = hostile
    with opened() as page:
        assert page.evaluate("window.owned") is None
        assert page.title() == title
        assert page.locator("h1").inner_text() == title
        assert page.locator("script").count() == 2
        assert page.get_by_text(name).count() >= 1


def test_a_click_sorts_and_so_does_a_key(opened: Opened) -> None:
    with opened() as page:
        header = page.locator("#scores th", has_text="mIoU %")
        place = 1 + page.locator("#scores thead th").all_inner_texts().index("mIoU %")
        header.get_by_role("button").click()
        down = [float(text.split()[0]) for text in column(page, place)]
        assert len(down) == 3
        assert header.get_attribute("aria-sort") == "descending"
        assert down == sorted(down, reverse=True)
        header.get_by_role("button").press("Enter")
        assert header.get_attribute("aria-sort") == "ascending"
        assert [float(text.split()[0]) for text in column(page, place)] == sorted(down)
        gap = page.locator("#scores th", has_text="to baseline, over seeds")
        gap.get_by_role("button").press("Space")
        assert header.get_attribute("aria-sort") is None
        order = page.locator("#scores thead th").all_inner_texts().index("to baseline, over seeds") + 1
        assert column(page, order)[-1] == "baseline"  # unknown stays last, both ways
        gap.get_by_role("button").click()
        assert column(page, order)[-1] == "baseline"
        assert page.locator("#scores tbody").nth(1).inner_text().startswith("teacher")


def test_classes_in_another_order(opened: Opened) -> None:
    with opened() as page:
        before = page.locator("#classes article").all_inner_texts()
        page.get_by_label("Order").select_option("least")
        least = [
            float(text)
            for text in page.evaluate("[...document.querySelectorAll('.class')].map(c => c.dataset.least)")
            if text
        ]
        assert least == sorted(least)
        page.get_by_label("Order").select_option("place")
        assert page.locator("#classes article").all_inner_texts() == before


def test_the_line_is_dragged_and_moved_by_keys(opened: Opened) -> None:
    with opened() as page:
        stage = page.locator(".stage").first
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 30)
        page.mouse.up()
        assert cut(page) == pytest.approx(80, abs=1)
        page.mouse.move(box["x"] + 5, box["y"] + 30)
        assert cut(page) == pytest.approx(80, abs=1)  # it was let go
        handle = stage.get_by_role("slider")
        assert handle.get_attribute("aria-valuenow") == "80"
        handle.press("ArrowLeft")
        assert handle.get_attribute("aria-valuenow") == "78"
        handle.press("Home")
        assert (handle.get_attribute("aria-valuenow"), cut(page)) == ("0", 0)
        handle.press("End")
        assert cut(page) == 100
        assert cut(page, 1) != 100  # each image has its own


def test_the_line_follows_a_finger(opened: Opened) -> None:
    with opened(360, 740, has_touch=True, is_mobile=True) as page:
        stage = page.locator(".stage").first
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        page.touchscreen.tap(box["x"] + 0.25 * box["width"], box["y"] + 30)
        assert cut(page) == pytest.approx(25, abs=2)


def test_rows_are_switched_for_all_images(opened: Opened, screenshot: Screenshot) -> None:
    with opened() as page:
        shown = "[...document.querySelectorAll('.layer.on-right')].map(layer => layer.dataset.layer)"
        first = page.evaluate(shown)
        assert len(first) == page.locator(".sample").count() >= 6
        page.locator("fieldset").nth(1).get_by_label("teacher").check()
        other = page.evaluate(shown)
        assert len(set(other)) == 1
        assert set(other) != set(first)
        assert "teacher" in page.locator(".side-right").first.inner_text()
        page.keyboard.press("ArrowLeft")  # the radio buttons before it
        assert page.evaluate(shown) != other
        page.locator("fieldset").nth(0).get_by_label("ground truth").check()
        assert "ground truth" in page.locator(".side-left").first.inner_text()
        before = screenshot(page.locator(".stage").first)
        page.get_by_label("mark errors").check()
        assert screenshot(page.locator(".stage").first) != before
        page.locator("fieldset").nth(0).get_by_label("image").check()
        page.get_by_label("over the image").check()
        through = page.evaluate(
            "[...document.querySelectorAll('[data-layer=image]')].map(image => getComputedStyle(image).clipPath)"
        )
        assert set(through) == {"none"}  # below both sides


def test_only_images_with_a_class(opened: Opened) -> None:
    with opened() as page:
        samples = page.locator(".sample")
        everything = samples.count()
        buttons = page.locator("#class-filter button")
        counts = []
        for number in range(1, buttons.count()):
            button = buttons.nth(number)
            button.click()
            name, count = re.fullmatch(r"(.*?) ?(\d+)", button.inner_text().replace("\n", " ")).groups()
            counts.append(int(count))
            visible = samples.filter(visible=True)
            assert visible.count() == int(count) <= everything
            key = button.get_attribute("data-class")
            assert all(key in visible.nth(n).get_attribute("data-classes").split() for n in range(visible.count()))
            assert f"IoU of {name.strip()} of this image" in visible.first.locator(".score-title").inner_text()
            assert button.get_attribute("aria-pressed") == "true"
        assert min(counts) < everything
        buttons.first.click()
        assert samples.filter(visible=True).count() == everything


def test_values_are_read_off_the_curves(opened: Opened) -> None:
    with opened() as page:
        chart = page.locator(".chart").first
        chart.scroll_into_view_if_needed()
        box = chart.locator("svg").bounding_box()
        page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.5 * box["height"])
        readout = chart.locator(".readout")
        assert readout.is_visible()
        said = readout.inner_text()
        assert "iteration 24" in said
        assert len(re.findall(r"\d+\.\d\d %", said)) == 6  # two runs of two rows, one of two
        page.locator(".legend input").first.uncheck()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
        assert len(re.findall(r"\d+\.\d\d %", readout.inner_text())) < 6
        page.mouse.move(0, 0)
        assert readout.is_hidden()


def test_commands_are_copied_or_selected(opened: Opened) -> None:
    with opened(permissions=["clipboard-read", "clipboard-write"]) as page:
        button = page.locator("#recipes .copy").first
        button.click()
        page.wait_for_function("button => button.textContent !== 'Copy'", arg=button.element_handle())
        assert button.inner_text() in ("Copied", "Selected")


def test_keys_reach_everything(opened: Opened) -> None:
    with opened() as page:
        seen = set()
        for _ in range(200):
            page.keyboard.press("Tab")
            seen.add(
                page.evaluate("[document.activeElement.tagName, document.activeElement.className].join(' ').trim()")
            )
        for part in (
            "A",
            "BUTTON",
            "DIV scroll",
            "SPAN handle",
            "SUMMARY",
            "SELECT",
            "BUTTON copy needs-script",
            "BUTTON pill-button",
        ):
            assert part in seen


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_without_a_script(opened: Opened, screenshot: Screenshot, tmp_path: Path, width: int, height: int) -> None:
    with opened(width, height, java_script_enabled=False) as page:
        screenshot(page, path=tmp_path / f"plain-{width}.png", full_page=True)
        sample = page.locator(".sample").first
        pictures = sample.locator("figure img:not(.wrong)")
        assert pictures.count() == 6
        assert all(pictures.nth(number).is_visible() for number in range(6))
        assert page.locator(".needs-script").filter(visible=True).count() == 0
        assert page.locator("#training svg").first.is_visible()
        assert page.locator("#scores table.sortable").is_visible()


def test_contrast_is_enough(opened: Opened) -> None:
    """Ratio of text to what is behind it, by WCAG 2: at least 4.5."""
    for scheme in ("light", "dark"):
        with opened(color_scheme=scheme) as page:
            weak = page.evaluate(
                """() => {
                  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
                  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
                    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
                    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
                  const behind = (part) => {
                    for (let one = part; one; one = one.parentElement) {
                      const colour = parse(getComputedStyle(one).backgroundColor);
                      if (colour.length < 4 || colour[3] > 0) return colour;
                    }
                  };
                  const kinds = "p, dt, dd, th, td, small, a, h1, h2, h3, summary, label, button, code, figcaption";
                  const texts = [...document.querySelectorAll(`${kinds}, .chip`)];
                  return texts.filter((part) => part.offsetWidth && part.innerText.trim()).map((part) => {
                    const [a, b] = [light(parse(getComputedStyle(part).color)), light(behind(part))];
                    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), part.outerHTML.slice(0, 90)];
                  }).filter(([ratio]) => ratio < 4.5).slice(0, 5);
                }"""
            )
            assert weak == []
