"""The Gradio Space in headless Chromium: what the page shows is what the model says."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.models import TEXTS

from ubmoe_st import EmbeddingIndex, UBMoE
from ubmoe_st.answers import answer, find

pytestmark = pytest.mark.space

ROOT = Path(__file__).parents[1]
ARTIFACTS = Path(os.environ.get("CI_ARTIFACTS", ROOT / "runs" / "artifacts"))
WAIT_MS = 300_000
NEW_TOKENS = 80


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="the Space needs gradio: pip install 'ubmoe-st[space]'")
    sync_api = pytest.importorskip("playwright.sync_api", reason="driving Chromium needs playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def index(checkpoint, tmp_path_factory):
    pytest.importorskip("faiss")
    rows = [{"id": f"entry-{n}", "text": text} for n, text in enumerate(TEXTS)]
    folder = tmp_path_factory.mktemp("space") / "index"
    return EmbeddingIndex.build(UBMoE(str(checkpoint)), rows, folder, kind="flat", with_title=False)


@pytest.fixture(scope="module")
def address(browser, checkpoint, base, index, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"UBMOE_MODEL": str(checkpoint), "UBMOE_INDEX": str(index.path), "UBMOE_BASE": str(base)}
    server = {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    log = tmp_path_factory.mktemp("log") / "space.log"
    with open(log, "w") as output:
        command = [sys.executable, str(ROOT / "space" / "app.py")]
        process = subprocess.Popen(command, env={**os.environ, **own, **server}, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + WAIT_MS / 1000
            while process.poll() is None and time.monotonic() < deadline:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.5)
            assert process.poll() is None, log.read_text()[-3000:]
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def page(browser, address):
    opened = browser.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.set_default_timeout(WAIT_MS)
    opened.goto(address)
    yield opened
    opened.close()
    assert errors == []


def screenshot(page, name: str) -> None:
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(ARTIFACTS / name), full_page=True)


def test_search_and_answer(page, checkpoint, index):
    from playwright.sync_api import expect

    model = UBMoE(str(checkpoint), low_memory=True)
    expected = {}
    for question in [*TEXTS, "the blue house", "a bird and a train"]:
        hits = find(index, question, 4)
        expected[question] = hits, answer(model, question, hits[:2], max_new_tokens=NEW_TOKENS)
    question = next(question for question, (_, text) in expected.items() if text.split())
    hits, text = expected[question]

    page.locator("#question textarea, #question input").first.fill(question)
    page.locator("#ask").click()
    words = r"\s+".join(map(re.escape, text.split()))
    expect(page.locator("#answer textarea")).to_have_value(re.compile(rf"^\s*{words}\s*$"), timeout=WAIT_MS)
    found = page.locator("#hits").inner_text()
    positions = [found.index(hit.id) for hit in hits]
    assert positions == sorted(positions)
    assert all(f"{hit.score:.3f}" in found for hit in hits)
    screenshot(page, "space-search.png")


def test_the_lossless_check(page):
    from playwright.sync_api import expect

    page.get_by_role("tab", name="Lossless check").click()
    page.locator("#text textarea, #text input").first.fill(TEXTS[1])
    page.locator("#compare").click()
    verdict = page.locator("#verdict")
    expect(verdict).to_contain_text("equal bit for bit", timeout=WAIT_MS)
    shown = verdict.inner_text()
    assert "against base (model.safetensors): equal" in shown
    assert re.search(r"generate\s+0\s", shown)
    assert float(re.search(r"embed\s+([\d.e+-]+)", shown).group(1)) > 0.01
    screenshot(page, "space-lossless.png")


def test_an_empty_question_is_told_so(page):
    page.locator("#question textarea, #question input").first.fill("  ")
    page.locator("#ask").click()
    page.get_by_text("Type a question first.").wait_for()


def test_the_front_matter_names_what_is_tested():
    import yaml

    front = yaml.safe_load((ROOT / "space" / "README.md").read_text().split("---")[1])
    assert front["sdk"] == "gradio"
    assert f"gradio=={front['sdk_version']}" in (ROOT / "constraints.txt").read_text().split()
    assert (ROOT / "space" / front["app_file"]).is_file()
    assert re.search(rf'^MODEL = "{front["models"][0]}"$', (ROOT / "space" / "app.py").read_text(), re.MULTILINE)
