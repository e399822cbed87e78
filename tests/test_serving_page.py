"""The page in a real Chromium: what people do on it, by mouse, by keyboard and on a phone.

Screenshots go to the folder named by FSSA_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)

from serving_tiny import Tiny, tiny_server  # noqa: E402
from tiny import make_choices  # noqa: E402

from fssa_fast import Choice  # noqa: E402
from fssa_fast.serving.keys import Key  # noqa: E402

HOSTILE = "<img src=x onerror=document.title='owned'>"
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    with tiny_server(tmp_path_factory.mktemp("page") / "users.db") as running:
        for seed, name in enumerate(("alice", "bob", "carol", "dave")):
            running.policy.users.add(name, make_choices(seed))
        running.policy.users.add(HOSTILE, [Choice("w11 w12", HOSTILE, HOSTILE)])
        yield running


@pytest.fixture
def page(browser: Any, server: Tiny) -> Iterator[Any]:
    yield from open_page(browser, server.url)


def open_page(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page at the server; what goes wrong in it fails the test."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    found, problems = context.new_page(), []
    found.set_default_timeout(15_000)
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda message: message.type == "error" and problems.append(message.text))
    found.goto(url)
    yield found
    context.close()
    assert [one for one in problems if "Failed to load resource" not in one] == []  # answers of 400 and more


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("FSSA_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def ask(page: Any) -> None:
    page.get_by_label("Question").fill("w7 w8 w9")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#answers small:not(:empty)").first.wait_for()
    expect(page.locator("#answers .going")).to_have_count(0, timeout=15_000)


def test_one_question_is_answered_for_several_side_by_side(page):
    page.get_by_label("alice", exact=True).wait_for()
    page.get_by_label("and on the way from").check()
    page.get_by_label("from", exact=True).select_option("alice")
    page.get_by_label("to", exact=True).select_option("bob")
    page.get_by_label("share of the second").fill("30")
    ask(page)
    titles = page.locator("#answers h3").all_inner_texts()
    assert "alice" in titles and "the base model" in titles and "70 % alice, 30 % bob" in titles
    assert len(set(page.locator("#answers p").all_inner_texts())) > 1
    for note in page.locator("#answers small").all_inner_texts():
        assert re.match(r"(ended|cut at the limit), first words after \d+ ms", note)
    picture(page, "answers-light")


def test_the_better_answer_moves_the_user_on_the_map(page, server):
    page.get_by_label("User", exact=True).select_option("carol")
    page.get_by_label("Question").fill("w7 w8 w9")
    before = len(server.policy.users.choices("carol"))
    page.get_by_role("button", name="Two answers").click()
    page.locator("#pair article").nth(1).wait_for()
    texts = page.locator("#pair p").all_inner_texts()
    picture(page, "pair")
    page.get_by_role("button", name="This one is better").nth(1).click()
    page.wait_for_selector("#map polyline")
    (chosen, rejected) = server.policy.users.choices("carol")[-1]
    assert (chosen.text, rejected.text, chosen.prompt) == (texts[1], texts[0], "w7 w8 w9")
    assert page.locator("#choices li").count() == before + 1
    points = page.locator("#map polyline").get_attribute("points").split()
    assert len(points) == 2 and points[0] != points[1]
    picture(page, "moved")
    page.get_by_role("button", name="Remove this choice").nth(before).click()
    expect(page.locator("#choices li")).to_have_count(before)
    assert len(server.policy.users.choices("carol")) == before


def test_what_people_wrote_is_text(page):
    page.get_by_label("User", exact=True).select_option(HOSTILE)
    page.locator("#choices").get_by_text("Worse: " + HOSTILE).wait_for()
    assert page.locator("img").count() == 0 and page.title() == "fssa"
    policy = page.request.get(page.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_users_are_added_and_deleted_by_keyboard_alone(page, server):
    page.get_by_label("alice", exact=True).wait_for()
    page.keyboard.press("Tab")
    for _ in range(60):
        if page.evaluate("document.activeElement.id") == "new-name":
            break
        page.keyboard.press("Tab")
    page.keyboard.type("erin")
    page.keyboard.press("Enter")
    expect(page.locator("#who")).to_have_value("erin")
    assert "erin" in server.policy.users
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#delete").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#who")).not_to_have_value("erin")
    assert "erin" not in server.policy.users


def test_a_failure_is_said(page, server):
    page.get_by_label("User", exact=True).select_option("dave")
    server.policy.users.remove("dave")
    page.get_by_role("button", name="Two answers").click()
    page.locator("#problem").get_by_text("expected one of this key's users, got 'dave'").wait_for()
    server.policy.users.add("dave", make_choices(3))


def test_on_a_phone_in_the_dark(browser, server):
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    for page in open_page(browser, server.url, **phone):
        page.get_by_label("alice", exact=True).wait_for()
        ask(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is beside the screen"
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", ground))) < 3 * 64
        picture(page, "phone-dark")


def test_a_key_is_asked_for(browser, tmp_path):
    keys = [Key(hashlib.sha256(b"secret").hexdigest(), namespace="acme")]
    with tiny_server(tmp_path / "users.db", keys) as server:
        server.policy.users.add("acme/zoe", make_choices(5))
        for page in open_page(browser, server.url):
            page.get_by_label("Key, kept until").fill("secret")
            page.keyboard.press("Enter")
            page.get_by_label("zoe", exact=True).wait_for()
            assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
