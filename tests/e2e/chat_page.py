#!/usr/bin/env python3
"""The chat page in headless Chromium, against a running server.

    POMONA_URL=http://127.0.0.1:8000 python3 tests/e2e/chat_page.py [SCREENSHOT.png]

Needs Chromium (found on the PATH, or named by CHROMIUM) and nothing else: it is driven over the
DevTools protocol's pipe. POMONA_MODEL chooses the model, POMONA_API_KEY the key if there is one.
With a SCREENSHOT path, `SCREENSHOT.png` and `SCREENSHOT-dark.png` show the page with an answer.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

PATIENCE_S = 60
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Printed by the page if any of it were run or parsed.
INJECTION = '<img src=x onerror="window.injected=1"><script>window.injected=1</script>'


class Browser:
    """Chromium with one page."""

    def __init__(self, profile):
        program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
        if program is None:
            sys.exit("no Chromium found: install it (Debian: apt-get install chromium) or set CHROMIUM")
        commands, self.write = os.pipe()
        self.read, answers = os.pipe()

        def onto_three_and_four():
            # First out of the way of each other, then to where Chromium looks.
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (commands, answers)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                 "--hide-scrollbars", "--no-first-run", "--disable-background-networking",
                 "--disable-dev-shm-usage", "--window-size=1200,860",
                 "--user-data-dir=" + profile, "about:blank"]
        self.process = subprocess.Popen(
            [program, *flags], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=onto_three_and_four)
        os.close(commands)
        os.close(answers)
        self.buffer, self.number, self.session, self.complaints = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Runtime", "Page", "Log", "Network"):
            self.call(domain + ".enable")

    def message(self, deadline):
        while b"\0" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.read], [], [], left)[0]:
                raise TimeoutError("Chromium does not answer")
            piece = os.read(self.read, 1 << 16)
            if not piece:
                raise EOFError("Chromium has ended")
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(line)

    def call(self, method, **params):
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.write, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            message = self.message(deadline)
            self.listen(message)
            if message.get("id") == self.number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def listen(self, message):
        """Notes whatever a console would show in red."""
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"].get("text", "") + str(params))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(params["entry"]))

    def run(self, script):
        """The value of a script in the page."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                           returnByValue=True)
        assert "exceptionDetails" not in result, f"{script}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def wait(self, what, script):
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self.run(script)):
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for {what}; the page says: "
                                     + self.run("document.body.innerText"))
            time.sleep(0.03)
        return value

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("the page", "document.readyState === 'complete' && !!document.querySelector('#prompt')")

    def type(self, text):
        self.run("document.querySelector('#prompt').focus()")
        self.call("Input.insertText", text=text)

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text="\r" if key == "Enter" else "",
                      windowsVirtualKeyCode=code)

    def picture(self, path):
        data = self.call("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


LAST = "[...document.querySelectorAll('.turn.assistant')].at(-1)"
TEXT = f"({LAST}?.querySelector('.text').textContent ?? '')"
DONE = f"({LAST} && !{LAST}.classList.contains('busy') && document.querySelector('#stop').hidden)"
STATS = f"({LAST}?.querySelector('.stats')?.textContent ?? '')"
NO_ERROR = f"!document.querySelector('.error')"


def set_field(browser, name, value):
    script = (f"(() => {{ const field = document.getElementById({json.dumps(name)});"
              f"field.value = {json.dumps(str(value))};"
              "field.dispatchEvent(new Event('input', { bubbles: true }));"
              "field.dispatchEvent(new Event('change', { bubbles: true })); })()")
    browser.run(script)


def shows_models(browser):
    if key := os.environ.get("POMONA_API_KEY"):
        browser.wait("the refusal", "/API key/.test(document.querySelector('#status').textContent)")
        set_field(browser, "key", key)
    browser.wait("the models", "!document.querySelector('#model').disabled")
    # Without the key, the console has rightly said that the list was refused.
    browser.complaints.clear()
    if model := os.environ.get("POMONA_MODEL"):
        set_field(browser, "model", model)
        assert browser.run("document.querySelector('#model').value") == model


def streams_an_answer(browser):
    set_field(browser, "temperature", 0)
    set_field(browser, "max_tokens", 160)
    browser.type("Tell me something about apples.")
    browser.press("Enter", 13)
    lengths = set()
    deadline = time.monotonic() + PATIENCE_S
    while not browser.run(f"!!{DONE}"):
        lengths.add(browser.run(f"{TEXT}.length"))
        assert time.monotonic() < deadline, "the answer does not end"
    assert browser.run(NO_ERROR), browser.run("document.querySelector('.error')?.textContent")
    assert browser.run(f"{TEXT}.length") > 0, "the answer is empty"
    assert len(lengths - {0}) >= 2, f"the text came at once, not as a stream: {lengths}"
    stats = browser.run(STATS)
    assert "tok/s" in stats and "first token" in stats and "tokens" in stats, stats


def makes_answers_long(browser, tokens):
    """A small model may end its answer before anybody could stop it."""
    browser.run(
        "(() => { const plain = window.fetch; window.fetch = (path, options) => {"
        "if (!options?.body) return plain(path, options);"
        f"const body = {{ ...JSON.parse(options.body), min_tokens: {tokens} }};"
        "return plain(path, { ...options, body: JSON.stringify(body) }); }; })()")
    set_field(browser, "max_tokens", tokens)


def stops_when_told(browser, how):
    browser.type("Count as far as you can: one, two, three")
    browser.press("Enter", 13)
    browser.wait("the text to begin", f"{TEXT}.length > 3 && !document.querySelector('#stop').hidden")
    how()
    browser.wait("the answer to stop", f"{DONE} && {STATS}.includes('stopped')")
    length = browser.run(f"{TEXT}.length")
    time.sleep(0.2)
    assert browser.run(f"{TEXT}.length") == length, "text came after the stop"
    assert browser.run(NO_ERROR)


def keeps_the_conversation(browser, url):
    turns = "document.querySelectorAll('.turn').length"
    text = browser.run("document.querySelector('#log').textContent")
    count = browser.run(turns)
    assert count >= 2
    browser.open(url)
    browser.wait("the conversation", f"{turns} === {count}")
    assert browser.run("document.querySelector('#log').textContent") == text
    browser.wait("the models", "!document.querySelector('#model').disabled")


def lets_nothing_in(browser):
    """What a user or a model writes stays text."""
    set_field(browser, "max_tokens", 4)
    browser.type(INJECTION)
    browser.press("Enter", 13)
    browser.wait("the answer", f"!!{DONE}")
    hostile = "\n\n".join([
        INJECTION, "# " + INJECTION, "- " + INJECTION, "`" + INJECTION + "`", "**" + INJECTION + "**",
        "```" + INJECTION + "\n" + INJECTION + "\n```", "> " + INJECTION,
        "[x](javascript:window.injected=1)", "[" + INJECTION + "](https://example.org/)"])
    drawn = browser.run(
        "import('/markdown.js').then(({ blocks, element }) => {"
        "const box = document.createElement('div'); document.body.append(box);"
        f"box.append(...blocks({json.dumps(hostile)}).map(element));"
        "const bad = box.querySelectorAll('img, script, [onerror], a:not([href^=\"https://\"])').length;"
        "const links = box.querySelectorAll('a').length; const code = box.querySelectorAll('pre').length;"
        "box.remove(); return { bad, links, code }; })")
    assert drawn == {"bad": 0, "links": 1, "code": 1}, drawn
    assert browser.run("window.injected === undefined"), "text was run"


def draws_markdown(browser):
    source = ("# Title\n\nSome *slanted* and **bold** text with `code`, snake_case_words and 2 * 3 * 4.\n\n"
              "- one\n- two\n  - inner\n\n3. three\n4. four\n\n```python\nprint('<b>')\n```\n\n---\n\n> said")
    html = browser.run(
        "import('/markdown.js').then(({ blocks, element }) => {"
        "const box = document.createElement('div');"
        f"box.append(...blocks({json.dumps(source)}).map(element)); return box.innerHTML; }})")
    for piece in ("<h1>Title</h1>", "<em>slanted</em>", "<strong>bold</strong>", "<code>code</code>",
                  "snake_case_words", "2 * 3 * 4", "<ul><li>one</li><li>two<ul><li>inner</li></ul></li></ul>",
                  '<ol start="3"><li>three</li><li>four</li></ol>', "print('&lt;b&gt;')", "<hr>",
                  "<blockquote><p>said</p></blockquote>"):
        assert piece in html, f"{piece} is not in {html}"


def starts_over(browser):
    browser.run("document.querySelector('#new').click()")
    browser.wait("an empty page", "document.querySelectorAll('.turn').length === 0"
                                  " && !document.querySelector('#welcome').hidden")


def shows_errors(browser):
    set_field(browser, "max_tokens", 100000000)
    browser.type("Hello")
    browser.press("Enter", 13)
    browser.wait("an error", "document.querySelector('.error')?.textContent.includes('max_tokens')")
    set_field(browser, "max_tokens", "")


def main():
    url = os.environ.get("POMONA_URL", "http://127.0.0.1:8000").rstrip("/") + "/"
    profile = tempfile.mkdtemp(prefix="pomona-page-")
    browser = Browser(profile)
    try:
        browser.open(url)
        shows_models(browser)
        draws_markdown(browser)
        streams_an_answer(browser)
        if len(sys.argv) > 1:
            stem = sys.argv[1].removesuffix(".png")
            browser.picture(stem + ".png")
            dark = [{"name": "prefers-color-scheme", "value": "dark"}]
            browser.call("Emulation.setEmulatedMedia", features=dark)
            browser.picture(stem + "-dark.png")
            browser.call("Emulation.setEmulatedMedia", features=[])
        makes_answers_long(browser, 1000)
        stops_when_told(browser, lambda: browser.run("document.querySelector('#stop').click()"))
        stops_when_told(browser, lambda: browser.press("Escape", 27))
        keeps_the_conversation(browser, url)
        lets_nothing_in(browser)
        starts_over(browser)
        assert not browser.complaints, browser.complaints
        # From here on the console may say that a request was refused.
        shows_errors(browser)
        starts_over(browser)
        print("chat page: all is well")
    finally:
        browser.close()
        shutil.rmtree(profile, ignore_errors=True)


if __name__ == "__main__":
    main()
