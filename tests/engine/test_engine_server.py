"""The HTTP server as its users meet it: a process of its own on loopback, the `openai` client, and raw bad requests."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from openai import NotFoundError, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine.greedy import Greedy
from tierd.cli.admin import ask
from tierd_engine.demo.processes import Daemon
from tierd_engine.llm import LLM

COMMAND = Path(sys.executable).parent / "tierd-engine"
PAGES = 96
SYSTEM = "You answer in riddles, you never lie, and you have all the time that there is in the world. " * 2


@pytest.fixture(scope="module", params=["copy", "tier"])
def served(request: pytest.FixtureRequest, spoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """`tierd-engine serve` with a daemon, used in both ways.

    `.url`, `.client`, `.daemon`, `.top` (the tier of hits), `.oracle(text, new)` and `.metric(name)`.
    """
    work = tmp_path_factory.mktemp("s")
    daemon = Daemon(work, work / "state", work / "daemon.log", gpu=64 << 20)
    daemon.start()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--tierd", daemon.socket, "--port", port, "--pages", PAGES, "--name", "tiny", "--chunk-tokens", 64]
    arguments += ["--memory", request.param]
    with (work / "server.log").open("w") as log:
        command = [COMMAND, "serve", spoken, *arguments]
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: get(url + "/health") is not None or process.poll() is not None, 60)
        assert process.poll() is None, (work / "server.log").read_text()
        tokenizer = AutoTokenizer.from_pretrained(spoken)
        greedy = Greedy(AutoModelForCausalLM.from_pretrained(spoken))
        yield SimpleNamespace(
            url=url,
            client=OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60),
            daemon=daemon,
            top="gpu" if request.param == "tier" else "cpu",
            oracle=lambda text, new: tokenizer.decode(greedy(tokenizer(text)["input_ids"], new)),
            metric=lambda name: metric(url, name),
        )
        wait_until(lambda: metric(url, "tierd_engine_pages_free") == PAGES, 10)
    finally:
        process.terminate()
        process.wait(30)
        daemon.stop()
    assert process.returncode in (0, -15), (work / "server.log").read_text()


def get(url: str) -> str | None:
    """The body, or None while nobody listens."""
    try:
        with urlopen(url, timeout=10) as answer:
            return answer.read().decode()
    except OSError:
        return None


def metric(url: str, name: str) -> float:
    """The value of a series, 0 when there is none."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", get(url + "/metrics") or "", flags=re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def post(url: str, body: object, path: str = "/v1/completions") -> tuple[int, dict]:
    """Status and JSON of a raw request; bytes go as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(url + path, data, {"Content-Type": "application/json"}), timeout=60) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


def chat(messages: list[dict]) -> str:
    """What the tiny model's template makes of messages."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


def test_concurrent_chats_with_a_shared_system_prompt_hit_it(served: SimpleNamespace) -> None:
    """Six conversations of two turns at once: every answer is the oracle's, and later prompts are hits."""

    def converse(number: int) -> int:
        messages = [{"role": "system", "content": SYSTEM}]
        cached = 0
        for turn in range(2):
            messages.append({"role": "user", "content": f"Question {number} in turn {turn}?"})
            answer = served.client.chat.completions.create(model="tiny", messages=messages, max_tokens=20, temperature=0)
            assert answer.choices[0].message.content == served.oracle(chat(messages), 20)
            assert answer.usage.prompt_tokens == len(chat(messages)) and answer.usage.completion_tokens == 20
            assert answer.choices[0].finish_reason == "length"
            cached = answer.usage.prompt_tokens_details.cached_tokens
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        return cached

    with ThreadPoolExecutor(6) as threads:
        cached = list(threads.map(converse, range(6)))
    assert sum(hit >= 208 for hit in cached) >= 3, "second turns find the first, unless computing was quicker than loading"
    assert served.metric("tierd_engine_hit_tokens_total") >= sum(cached)
    wait_until(lambda: served.metric("tierd_engine_pages_free") == PAGES, 10)
    converse(0)
    assert served.metric(f'tierd_engine_blocks_looked_up_total{{tier="{served.top}"}}') > 0


def test_a_stream_is_the_answer_in_pieces(served: SimpleNamespace) -> None:
    """Chunks add up to the oracle's text, the first has the role, the last the usage."""
    messages = [{"role": "user", "content": "Stream to me."}]
    options = dict(model="tiny", messages=messages, max_tokens=30, temperature=0)
    chunks = list(served.client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(text or "" for text in texts) == served.oracle(chat(messages), 30)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(texts) >= 20
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 30


def test_completions_of_several_prompts_and_samples_keep_their_order(served: SimpleNamespace) -> None:
    """Two prompts, two samples each: choice 2p + s is sample s of prompt p; token ids are as good as text."""
    answer = served.client.completions.create(model="tiny", prompt=["First.", "Second."], n=2, max_tokens=9, temperature=0)
    texts = [choice.text for choice in answer.choices]
    assert texts == [served.oracle(prompt, 9) for prompt in ("First.", "First.", "Second.", "Second.")]
    ids = served.client.completions.create(model="tiny", prompt=list(b"First."), max_tokens=9, temperature=0)
    assert ids.choices[0].text == texts[0]


def test_seeds_repeat_and_samples_differ(served: SimpleNamespace) -> None:
    """The same seed gives the same three samples, which are not the same among themselves."""
    options = dict(model="tiny", prompt="Roll the dice.", n=3, max_tokens=12, temperature=1.2, top_p=0.9, seed=7)
    first, second = (served.client.completions.create(**options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) > 1


def test_a_stop_string_ends_the_text_before_it(served: SimpleNamespace) -> None:
    """Streaming too: no part of the stop string is shown."""
    whole = served.oracle("Stop here.", 40)
    stop = whole[17:20]
    for stream in (False, True):
        answer = served.client.completions.create(
            model="tiny", prompt="Stop here.", max_tokens=40, temperature=0, stop=[stop, "not in it"], stream=stream
        )
        parts = list(answer) if stream else [answer]
        assert "".join(part.choices[0].text for part in parts) == whole[: whole.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_a_client_that_goes_away_aborts_its_request(served: SimpleNamespace) -> None:
    """In the middle of a stream, and while waiting for a whole answer; the pages are free again."""
    aborted = 'tierd_engine_sequences_total{reason="abort"}'
    before = served.metric(aborted)
    stream = served.client.completions.create(model="tiny", prompt="Tell me all.", max_tokens=1400, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: served.metric(aborted) == before + 1, 20)
    body = json.dumps({"model": "tiny", "prompt": "Tell me all.", "max_tokens": 1400}).encode()
    port = int(served.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        wait_until(lambda: served.metric("tierd_engine_sequences_running") == 1, 20)
    wait_until(lambda: served.metric(aborted) == before + 2, 20)
    wait_until(lambda: served.metric("tierd_engine_pages_free") == PAGES, 20)


@pytest.mark.parametrize(
    ("body", "status", "param", "reason"),
    [
        (b"{not json", 400, "body", "not valid JSON"),
        ([1], 400, "body", "JSON object"),
        ({"prompt": "x"}, 400, "model", "missing"),
        ({"model": "tiny"}, 400, "prompt", "missing"),
        ({"model": "other", "prompt": "x"}, 404, "model", "'other' is not served here; served is tiny"),
        ({"model": "tiny", "prompt": "x", "temprature": 1}, 400, "temprature", "unknown parameter"),
        ({"model": "tiny", "prompt": "x", "temperature": "hot"}, 400, "temperature", "'hot' is not of type int or float"),
        ({"model": "tiny", "prompt": "x", "temperature": -1}, 400, "sampling", "temperature -1"),
        ({"model": "tiny", "prompt": "x", "top_p": 2}, 400, "sampling", "top_p 2"),
        ({"model": "tiny", "prompt": "x", "n": 0}, 400, "sampling", "n 0"),
        ({"model": "tiny", "prompt": "x", "n": True}, 400, "n", "not of type int"),
        ({"model": "tiny", "prompt": "x", "max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"model": "tiny", "prompt": "x", "conversation": "c" * 129}, 400, "conversation", "1 to 128 are possible"),
        ({"model": "tiny", "prompt": "x", "keep": {"ttl_seconds": 1e9}}, 400, "keep", "from 0.001 to 604800"),
        ({"model": "tiny", "prompt": "x", "keep": {"ttl_seconds": 1, "priority": 101}}, 400, "keep", "from 0 to 100"),
        ({"model": "tiny", "prompt": "x", "keep": {"ttl": 1}}, 400, "keep", "unknown parameter 'ttl'"),
        ({"model": "tiny", "prompt": "x", "stop": [""]}, 400, "sampling", "none of them empty"),
        ({"model": "tiny", "prompt": "x", "logprobs": 5}, 400, "logprobs", "not supported"),
        ({"model": "tiny", "prompt": ""}, 400, "request", "0 prompt"),
        ({"model": "tiny", "prompt": []}, 400, "prompt", "at least one"),
        ({"model": "tiny", "prompt": [1, "a"]}, 400, "prompt", "neither text nor a list of token ids"),
        ({"model": "tiny", "prompt": [128]}, 400, "request", "the model knows 0 to 127"),
        ({"model": "tiny", "prompt": "x" * 1536}, 400, "prompt", "1536 tokens are too long; the model and its pages hold 1536"),
        ({"model": "tiny", "prompt": "x", "max_tokens": 1536}, 400, "request", "do not fit 96 pages"),
    ],
)
def test_bad_input_is_refused_by_name(served: SimpleNamespace, body: object, status: int, param: str, reason: str) -> None:
    """A 4xx with JSON that names the field; everything else keeps running."""
    answer = post(served.url, body)
    assert answer[0] == status
    assert answer[1]["error"]["param"] == param
    assert reason in answer[1]["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one"),
        (["hello"], r"messages[0]: an object with role and content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content: text is needed"),
        ("hello", "not of type list"),
    ],
)
def test_bad_messages_are_refused(served: SimpleNamespace, messages: object, reason: str) -> None:
    """No messages, something else than messages, and content that is no text."""
    status, answer = post(served.url, {"model": "tiny", "messages": messages}, "/v1/chat/completions")
    assert (status, reason in answer["error"]["message"]) == (400, True), answer


def test_models_and_unknown_paths(served: SimpleNamespace) -> None:
    """The list has the served name; what there is not is a 404 in JSON."""
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    with pytest.raises(NotFoundError):
        served.client.embeddings.create(model="tiny", input="x")
    assert post(served.url, {}, "/health")[0] == 405


def test_a_request_has_its_chain_kept(served: SimpleNamespace) -> None:
    """The daemon lists it among what is pinned, with its priority and its end."""
    keep = {"ttl_seconds": 60, "priority": 9}
    served.client.completions.create(model="tiny", prompt="Keep this. " * 8, max_tokens=4, extra_body={"keep": keep})
    admin = served.daemon.socket.parent / "admin.sock"
    (space,) = ask(admin, "status", 20)["namespaces"]
    wait_until(lambda: any(pin.get("priority") == 9 for pin in ask(admin, "pin", 20, namespace=space["id"])["pins"]), 20)


def test_no_request_fails_when_the_daemon_is_killed(served: SimpleNamespace) -> None:
    """kill -9 in the middle of a batch: every answer is the oracle's, and later ones hit again."""
    prompts = [f"Request {number}. " * 6 for number in range(8)]

    def complete(prompt: str) -> str:
        options = dict(model="tiny", prompt=prompt, max_tokens=60, temperature=0)
        return served.client.completions.create(**options).choices[0].text

    expected = [served.oracle(prompt, 60) for prompt in prompts]
    killed = Event()

    def complete_until_killed(prompt: str) -> set[str]:
        answers = {complete(prompt)}
        while not killed.is_set():  # a small model is quick: there must be a batch when the daemon dies
            answers.add(complete(prompt))
        return answers

    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(complete_until_killed, prompt) for prompt in prompts]
        try:
            wait_until(lambda: served.metric("tierd_engine_sequences_running") > 2, 20)
            served.daemon.kill()
        finally:
            killed.set()
        assert [answer.result() for answer in answers] == [{text} for text in expected]
    assert [complete(prompt) for prompt in prompts] == expected
    hits = f'tierd_engine_blocks_looked_up_total{{tier="{served.top}"}}'
    before = served.metric(hits)
    wait_until(lambda: bool(complete(prompts[0])) and served.metric(hits) > before, 20)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "has no config.json and 0 .gguf files"),
        (lambda path: (path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}'), "no weights"),
    ],
)
def test_a_directory_without_a_model_is_refused_at_start(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    """Exit code 2 and one line that names the path."""
    make(tmp_path)
    done = subprocess.run([COMMAND, "serve", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("tierd-engine: model: ") and str(tmp_path) in done.stderr and reason in done.stderr


def test_every_series_is_documented(served: SimpleNamespace) -> None:
    """docs/engine.md has every series of `/metrics` with its type, and no other."""
    post(served.url, {"model": "tiny", "prompt": "x"})
    exported = set(re.findall(r"^# TYPE (\S+) (\S+)$", get(served.url + "/metrics") or "", flags=re.MULTILINE))
    exported = {(name, kind) for name, kind in exported if not name.endswith("_created")}
    text = (Path(__file__).parents[2] / "docs/engine.md").read_text()
    assert exported == set(re.findall(r"^\| `(tierd_engine_\w+)` \| (\w+) \|", text, flags=re.MULTILINE))


def test_a_model_in_bfloat16_is_served(spoken: Path, tmp_path: Path) -> None:
    """Over HTTP, without a daemon: the tokens are those that the same engine says in a program."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "server.log").open("w") as log:
        command = [COMMAND, "serve", spoken, "--port", str(port), "--pages", "48", "--name", "tiny", "--dtype", "bfloat16"]
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_until(lambda: get(url + "/health") is not None or process.poll() is not None, 60)
        status, answer = post(url, {"model": "tiny", "prompt": SYSTEM, "max_tokens": 12, "temperature": 0})
        with LLM(spoken, pages=48, dtype="bfloat16") as llm:
            expected = llm.generate(SYSTEM, 12).text
        assert status == 200 and answer["choices"][0]["text"] == expected
    finally:
        process.terminate()
        process.wait(30)
