"""The page in a real Chromium, over the real service: what a person types, sees and stops."""

from __future__ import annotations

import re
from typing import Any

import httpx2
import psutil
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.frontend.stack import Stack
from tests.processes import wait_until

pytestmark = pytest.mark.browser


ANSWER = ":is(#answer-status, #answer-details)"


def fact(page: Page, label: str, *, place: str = ANSWER) -> Locator:
    """The cell over which `label` stands."""
    return page.locator(f"{place} .facts > div", has=page.get_by_text(label, exact=True))


def value_of(page: Page, label: str, *, place: str = ANSWER) -> str:
    return fact(page, label, place=place).locator("dd").inner_text()


def choose(page: Page, element: str, option: str) -> None:
    """Pick from a choice of models once it is there."""
    page.locator(f"{element} input").click()
    page.get_by_role("option", name=re.compile(rf"^{re.escape(option)}\b")).click()


def set_number(page: Page, name: str, value: float, *, place: str = "generate") -> None:
    box = page.locator(f"#{place}-{name} input[type=number]")
    box.fill(str(value))
    box.blur()


def unfold(page: Page, *names: str) -> None:
    for name in names:
        page.get_by_role("button", name=name).click()


def ask(page: Page, prompt: str, *, model: str | None = None) -> None:
    page.locator("#prompt textarea").fill(prompt)
    if model:
        choose(page, "#model", model)
    page.locator("#run").click()


def wait_for_end(page: Page) -> None:
    expect(page.locator("#answer-status")).to_contain_text("Ended by")
    expect(page.locator("#run")).to_be_visible()


def as_shown(text: str) -> str:
    """What a text area makes of a text: it knows one kind of line end."""
    return re.sub("\r\n?", "\n", text)


def answer_text(page: Page) -> str:
    return page.locator("#answer textarea").input_value()


def job_of(page: Page, stack: Stack) -> dict[str, Any]:
    """The job behind the answer that stands on the page."""
    hint = fact(page, "Ended by").get_attribute("title") or ""
    return stack.job(hint.removeprefix("job "))


def wait_for_text(page: Page) -> str:
    """Return what there is of an answer that is still being written."""
    page.wait_for_function("document.querySelector('#answer textarea').value.length > 0")
    expect(page.locator("#stop-answer")).to_be_visible()
    return answer_text(page)


def test_an_answer_streams_and_tells_everything_about_itself(page: Page, stack: Stack) -> None:
    expect(page.locator("#api-status")).to_contain_text("models, 1 worker, idle.")
    set_number(page, "max_new_tokens", 60)
    ask(page, "First Citizen:", model="slow")
    early = wait_for_text(page)
    wait_for_end(page)
    text = answer_text(page)
    assert text.startswith(early) and len(text) > len(early)
    job = job_of(page, stack)
    assert job["status"] == "succeeded" and as_shown(job["text"]) == text
    assert value_of(page, "Ended by") == "token limit"
    assert value_of(page, "Seed") == str(job["seed"])
    assert value_of(page, "Model") == f"slow @ {job['revision'][:8]}"
    assert value_of(page, "Tokens") == f"{job['usage']['prompt_tokens']} + 60"
    assert re.fullmatch(r"[\d,.]+ tokens/s", value_of(page, "Speed"))
    assert re.fullmatch(r"[\d,.]+ m?s", value_of(page, "First token"))
    assert re.fullmatch(r"[\d,.]+ m?s", value_of(page, "Queue"))


def test_every_parameter_arrives_and_the_seed_repeats_the_answer(page: Page, stack: Stack) -> None:
    numbers = {
        "max_new_tokens": 30,
        "temperature": 1.25,
        "top_p": 0.8,
        "top_k": 40,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.2,
    }
    unfold(page, "More ways to choose a token", "Seed, stop texts, time limit")
    for name, number in numbers.items():
        set_number(page, name, number)
    page.locator("#generate-stop textarea").fill("never, never\n\\n\\n\\n")
    page.locator("#generate-timeout_s input").fill("77")
    ask(page, "def add(")
    wait_for_end(page)
    first = job_of(page, stack)
    expected = {**numbers, "stop": ["never, never", "\n\n\n"], "timeout_s": 77, "seed": first["seed"]}
    assert {name: first["parameters"][name] for name in expected} == expected
    assert first["model"] == "tiny"
    assert page.locator("#answer-details .notice").all_inner_texts() == first["warnings"]

    page.locator("#keep-seed").click()
    expect(page.locator("#generate-seed textarea, #generate-seed input")).to_have_value(str(first["seed"]))
    text = answer_text(page)
    page.locator("#run").click()
    expect(fact(page, "Ended by")).not_to_have_attribute("title", f"job {first['id']}")
    wait_for_end(page)
    second = job_of(page, stack)
    assert second["id"] != first["id"] and second["seed"] == first["seed"]
    assert answer_text(page) == text


def test_stop_cancels_the_job_in_the_service(page: Page, stack: Stack) -> None:
    set_number(page, "max_new_tokens", 2048)
    ask(page, "First Citizen:", model="slow")
    wait_for_text(page)
    page.locator("#stop-answer").click()
    wait_for_end(page)
    job = job_of(page, stack)
    assert job["status"] == "cancelled" and job["finish_reason"] == "cancelled"
    assert 0 < len(job["token_ids"]) < 2048
    assert value_of(page, "Ended by") == "stopped"
    assert answer_text(page) == as_shown(job["text"])
    wait_until(lambda: stack.num_unfinished() == 0, "the worker's slot to be free")


def test_closing_the_page_cancels_the_job(browser: Browser, page: Page, stack: Stack) -> None:
    set_number(page, "max_new_tokens", 2048)
    ask(page, "First Citizen:", model="slow")
    wait_for_text(page)
    assert stack.num_unfinished() == 1
    page.close()
    wait_until(lambda: stack.num_unfinished() == 0, "the job of a page that is gone to end", timeout_s=15)


def test_a_waiting_job_shows_its_place_and_can_be_stopped(page: Page, stack: Stack) -> None:
    expect(page.locator("#model input")).to_have_value(re.compile("tiny"))
    stack.worker.pause()
    try:
        ask(page, "First Citizen:")
        expect(page.locator("#answer-status")).to_contain_text("Place 1 in the queue")
        page.locator("#stop-answer").click()
        expect(page.locator("#run")).to_be_visible()
        assert job_of(page, stack)["status"] == "cancelled"
    finally:
        stack.worker.go_on()


def test_a_refusal_is_a_sentence(page: Page) -> None:
    unfold(page, "Seed, stop texts, time limit")
    page.locator("#generate-seed").locator("textarea, input").fill("soon")
    ask(page, "First Citizen:")
    expect(page.locator("#answer-status [role=alert]")).to_have_text(re.compile(r"seed.*soon.*\.$"))
    expect(page.locator("#run")).to_be_visible()


def test_the_page_says_that_the_api_is_away_and_recovers_by_itself(browser: Browser, stack: Stack) -> None:
    stack.stop_api()
    page = browser.new_page()
    page.goto(stack.page_url, wait_until="domcontentloaded")
    sentence = re.compile(rf"{re.escape(stack.api_url)} does not answer: start it, or set SMOLLM_API_URL\.$")
    expect(page.locator("#api-status [role=alert]")).to_have_text(sentence, timeout=20_000)
    ask(page, "First Citizen:")
    expect(page.locator("#answer-status [role=alert]")).to_have_text(sentence)
    expect(page.locator("#run")).to_be_visible()

    stack.restart_api()
    expect(page.locator("#api-status")).to_contain_text("1 worker", timeout=60_000)
    expect(page.locator("#model input")).to_have_value(re.compile("tiny"))
    page.locator("#run").click()
    wait_for_end(page)
    page.close()


def test_a_chat_answers_and_tells_what_the_generate_tab_tells(page: Page, stack: Stack) -> None:
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#chat-model input")).not_to_have_value("")
    choose(page, "#chat-model", "tiny")
    set_number(page, "max-tokens", 24, place="chat")
    message = page.get_by_placeholder("Message")
    message.fill("Speak, speak.")
    message.press("Enter")
    expect(fact(page, "Ended by", place="#chat-status")).to_be_visible()
    hint = fact(page, "Ended by", place="#chat-status").get_attribute("title") or ""
    job = stack.job(hint.removeprefix("job "))
    assert job["status"] == "succeeded" and job["parameters"]["temperature"] == 0
    assert value_of(page, "Seed", place="#chat-status") == str(job["seed"])
    expect(page.locator("#chat .user.message")).to_contain_text("Speak, speak.")
    expect(page.locator("#chat .bot.message")).to_have_count(1)
    expect(page.get_by_placeholder("Message")).to_be_enabled()
    page.get_by_placeholder("Message").fill("Again.")


def test_a_chat_that_waits_outlives_redis_being_away_for_a_moment(page: Page, stack: Stack) -> None:
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#chat-model input")).not_to_have_value("")
    choose(page, "#chat-model", "tiny")
    set_number(page, "max-tokens", 8, place="chat")
    stack.worker.pause()
    try:
        page.get_by_placeholder("Message").fill("Speak, speak.")
        page.get_by_placeholder("Message").press("Enter")
        expect(page.locator("#chat-status")).to_contain_text("Place 1 in the queue")
        looks = ("GET", "/jobs/{job_id}", 503)
        before = stack.num_answers(*looks)
        with stack.without_redis():
            wait_until(lambda: stack.num_answers(*looks) > before, "the page's look at its job to be refused")
    finally:
        stack.worker.go_on()
    expect(fact(page, "Ended by", place="#chat-status")).to_be_visible(timeout=60_000)
    assert value_of(page, "Ended by", place="#chat-status") == "token limit"


def test_the_stop_button_of_a_chat_cancels_its_job(page: Page, stack: Stack) -> None:
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#chat-model input")).not_to_have_value("")
    choose(page, "#chat-model", "slow")
    set_number(page, "max-tokens", 2048, place="chat")
    message = page.get_by_placeholder("Message")
    message.fill("Speak, speak.")
    message.press("Enter")
    wait_until(lambda: stack.num_unfinished() == 1, "the job to run")  # Gradio shows a bot's bubble before any text
    expect(page.locator("#chat .bot.message")).to_contain_text(re.compile(r"\S"))
    page.locator("#chat-message .stop-button").click()
    wait_until(lambda: stack.num_unfinished() == 0, "the job to be cancelled", timeout_s=15)
    expect(page.locator("#chat-status")).to_contain_text("Stopped.")


def test_two_models_answer_side_by_side_with_one_seed(page: Page, stack: Stack) -> None:
    page.get_by_role("tab", name="Compare").click()
    choose(page, "#compare-model-right", "slow")
    unfold(page, "Parameters of both")
    set_number(page, "max_new_tokens", 12, place="compare")
    page.locator("#compare-prompt textarea").fill("First Citizen:")
    page.locator("#compare-run").click()
    for side, model in (("left", "tiny"), ("right", "slow")):
        expect(fact(page, "Model", place=f"#compare-status-{side}").locator("dd")).to_contain_text(f"{model} @")
    seeds = {value_of(page, "Seed", place=f"#compare-status-{side}") for side in ("left", "right")}
    assert len(seeds) == 1
    boxes = [page.locator(f"#compare-answer-{side}").bounding_box() for side in ("left", "right")]
    assert len({box["y"] for box in boxes if box}) == 1


def test_a_run_is_plotted_and_its_export_is_offered_without_a_restart(page: Page, stack: Stack) -> None:
    page.get_by_role("tab", name="Training").click()
    summary = page.locator("#run-summary")
    expect(summary).to_contain_text("20 of 20", timeout=60_000)
    expect(summary).to_contain_text("finished", timeout=60_000)
    expect(summary.locator(".stage")).to_have_text(
        ["Foundation", "General + Code", "Specialized", "Refinement", "Final Polish"]
    )
    rows = httpx2.get(f"{stack.api_url}/runs/smoke/metrics", trust_env=False).json()["rows"]
    last = [row for row in rows if row["kind"] == "evaluation"][-1]["held_out"]["input"]["bits_per_byte"]
    expect(summary).to_contain_text(f"input {last:.3f}")
    for plot, num_lines in (("#loss-plot", 6 + 4), ("#rate-plot", 1), ("#speed-plot", 1)):
        # Vega draws every line of the layer that is seen as a path of its own.
        lines = page.locator(f"{plot} svg g.mark-line path[aria-roledescription='line mark']")
        expect(lines.first).to_be_visible()
        assert lines.count() >= num_lines
    expect(page.locator("#loss-legend li")).to_have_count(7)
    expect(page.locator("#samples .sample").first).to_contain_text("step 20")

    page.get_by_role("tab", name="Generate").click()
    choose(page, "#model", "smoke")
    ask(page, "First")
    wait_for_end(page)
    assert value_of(page, "Model").startswith("smoke @ ")


def test_the_service_tab_shows_queue_workers_and_models(page: Page) -> None:
    page.get_by_role("tab", name="Service").click()
    tables = page.locator("#service table.rows")
    expect(tables).to_have_count(3)
    expect(tables.nth(1)).to_contain_text("cpu, float32")
    expect(tables.nth(2)).to_contain_text("tiny, the default")


@pytest.mark.parametrize("page", [(390, None)], indirect=True)
def test_a_phone_shows_prompt_button_and_answer_first_and_the_sliders_folded(page: Page) -> None:
    expect(page.locator("#model input")).to_have_value(re.compile("tiny"))
    fold = page.get_by_role("button", name=re.compile(r"^Parameters\W*$"))
    expect(page.locator("#generate-temperature")).to_be_hidden()
    tops = []
    for element in ("#prompt", "#run", "#answer-status", "#answer", "#model"):
        box = page.locator(element).bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 390
        tops.append(box["y"])
    below = fold.bounding_box()
    assert below and [*tops, below["y"]] == sorted([*tops, below["y"]])
    before = page.locator("#answer").bounding_box()
    ask(page, "First Citizen:")
    wait_for_end(page)
    assert page.locator("#answer").bounding_box() == before, "an answer moved under its reader's eyes"
    fold.click()
    expect(page.locator("#generate-temperature")).to_be_visible()


@pytest.mark.parametrize("page", [(390, None), (768, None)], indirect=True)
def test_no_tab_is_wider_than_its_window(page: Page) -> None:
    width = page.viewport_size["width"] if page.viewport_size else 0
    landmarks = {
        "Generate": "#model input",
        "Chat": "#chat-message",
        "Compare": "#compare-run",
        "Training": "#loss-plot svg",
        "Service": "#service table.rows",
    }
    for tab, landmark in landmarks.items():
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(landmark).first).to_be_visible(timeout=60_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab


def test_a_wide_page_shows_its_sliders(page: Page) -> None:
    expect(page.locator("#model input")).to_have_value(re.compile("tiny"))
    expect(page.locator("#generate-temperature")).to_be_visible()


def test_a_stream_that_pauses_says_so_and_goes_on(page: Page, stack: Stack) -> None:
    set_number(page, "max_new_tokens", 2048)
    ask(page, "First Citizen:", model="slow")
    wait_for_text(page)
    stack.worker.pause()
    try:
        expect(page.locator("#answer-status")).to_contain_text("another one goes on from here")
    finally:
        stack.worker.go_on()
    expect(fact(page, "Speed")).to_be_visible()
    page.locator("#stop-answer").click()
    wait_for_end(page)


def test_continue_goes_on_from_the_answer(page: Page, stack: Stack) -> None:
    set_number(page, "max_new_tokens", 8)
    ask(page, "First Citizen:")
    wait_for_end(page)
    first = job_of(page, stack)
    page.locator("#continue").click()
    expect(fact(page, "Ended by")).not_to_have_attribute("title", f"job {first['id']}")
    wait_for_end(page)
    second = job_of(page, stack)
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    expect(page.locator("#prompt textarea")).to_have_value("First Citizen:" + as_shown(first["text"]))


def test_the_page_process_speaks_to_this_machine_only(page: Page, stack: Stack) -> None:
    expect(page.locator("#api-status")).to_contain_text("worker")
    connections = psutil.Process(stack.page.popen.pid).net_connections()
    assert {one.raddr.ip for one in connections if one.raddr} <= {"127.0.0.1"}
    assert "Traceback" not in stack.page.log, stack.page.log
