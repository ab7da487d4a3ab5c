"""Statement F1 with a judge behind a local HTTP server that speaks OpenAI's protocol."""

import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from molmo2.eval import judge as judge_module
from molmo2.eval.benchmarks import load_suites
from molmo2.eval.judge import Judge
from molmo2.eval.metrics.caption_scores import statement_f1
from molmo2.eval.metrics.scores import Answered
from shards.schema import Text
from tools import evaluate


class Endpoint:
    """Replies as a language model would: a sentence is a statement, supported if the caption has it word for word."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.statuses: list[int] = []  # HTTP statuses of the next replies; a reply after them has 200
        self.verdict = "{number}. **{verdict}**"

    def reply(self, body: dict[str, Any]) -> str:
        (message,) = body["messages"]
        caption, _, statements = message["content"].split("Caption:\n")[1].partition("\n\nStatements:\n")
        sentences = [part.strip() for part in caption.split(".") if part.strip()]
        if not statements:
            return "\n".join(f"- {sentence}" for sentence in sentences) or "NONE"
        numbered = re.findall(r"(\d+)\. (.*)", statements)
        return "\n".join(
            self.verdict.format(number=number, verdict="Yes" if statement in sentences else "no")
            for number, statement in numbered
        )


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Endpoint]]:
    """The base URL of a running endpoint, and its state."""
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, document: Any) -> None:
            state.keys.add(self.headers["Authorization"])
            self.send_response(state.statuses.pop(0) if state.statuses else 200)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.answer({"data": [{"id": "first"}, {"id": "second"}]})

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append(body)
            self.answer({"choices": [{"message": {"content": state.reply(body)}}]})

        def log_message(self, *arguments: Any) -> None:
            pass

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/", state
    server.shutdown()
    server.server_close()


FACTS = ["a dog", "it runs", "grass", "rain"]
ASKED = Text(style="video_long_caption", answer="a dog. it runs. grass. rain.")


def answered(prediction: str) -> Answered:
    return Answered(prediction, ASKED, {"statements": FACTS})


def test_statement_f1_worked(endpoint: tuple[str, Endpoint], tmp_path: Path) -> None:
    """Two of three statements are right, two of the four wanted ones are said: P = 2/3, R = 2/4, F = 4/7."""
    url, _ = endpoint
    metric = statement_f1(Judge(url, tmp_path / "replies.jsonl"))
    assert metric.__name__ == "statement_f1"
    assert metric([answered("a dog. it runs. a cat.")]) == pytest.approx(4 / 7)
    assert metric([answered("a cat.")]) == 0
    assert metric([answered("")]) == 0
    assert metric([answered("a dog. it runs. a cat."), answered(ASKED.answer)]) == pytest.approx((4 / 7 + 1) / 2)
    assert metric([Answered("", replace(ASKED, answer=""), {"statements": []})]) == 1


@pytest.mark.slow
def test_replies_are_stored_and_reused(endpoint: tuple[str, Endpoint], tmp_path: Path) -> None:
    url, state = endpoint
    cache = tmp_path / "new" / "replies.jsonl"
    answers = [answered(f"a dog. number {i}.") for i in range(40)]
    first = statement_f1(Judge(url, cache))(answers)
    assert len(state.requests) == len(cache.read_text().splitlines()) == 3 * len(answers)
    assert state.keys == {"Bearer secret"} and {request["model"] for request in state.requests} == {"first"}
    cache.write_bytes(cache.read_bytes()[:-7])  # killed in the last line
    assert statement_f1(Judge(url, cache))(answers) == first
    assert len(state.requests) == 3 * len(answers) + 1
    statement_f1(Judge(url, cache, "second"))(answers[:1])  # the replies of another model are not taken
    assert len(state.requests) == 3 * len(answers) + 4


def test_a_busy_endpoint_is_asked_again(
    endpoint: tuple[str, Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, state = endpoint
    monkeypatch.setattr(judge_module, "BACKOFF", 0.01)
    judge = Judge(url, tmp_path / "replies.jsonl")
    state.statuses = [429, 503]
    assert judge.statements("a dog. a cat.") == ["a dog", "a cat"]
    state.statuses = [401]
    with pytest.raises(ValueError, match=r"/chat/completions: status 401: .*OPENAI_API_KEY"):
        judge.statements("a dog.")


def test_a_reply_without_verdicts_is_an_error_and_not_stored(endpoint: tuple[str, Endpoint], tmp_path: Path) -> None:
    url, state = endpoint
    judge = Judge(url, tmp_path / "replies.jsonl")
    state.verdict = "perhaps"
    with pytest.raises(ValueError, match="no verdict on statement 1 of 4 in the reply 'perhaps"):
        judge.supported(FACTS, "a dog.")
    state.verdict = "{number}: {verdict}"
    assert judge.supported(FACTS, "a dog.") == [True, False, False, False]
    (tmp_path / "replies.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"replies.jsonl: not a file of replies"):
        Judge(url, tmp_path / "replies.jsonl")


def test_an_endpoint_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "BACKOFF", 0.01)
    with pytest.raises(ValueError, match=r"--judge http://127.0.0.1:9: .*start the endpoint"):
        Judge("http://127.0.0.1:9", tmp_path / "replies.jsonl")


def test_the_captions_benchmark_is_judged_and_others_are_refused(
    endpoint: tuple[str, Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = endpoint
    (captions,) = (one for one in load_suites()["video"].benchmarks if one.dataset == "molmo2-cap-eval")
    assert captions.judged == ("statement_f1",)
    judged = captions.with_judge(Judge(url, tmp_path / "replies.jsonl"))
    assert judged.corpus[-1]([answered("a dog. it runs. a cat.")]) == pytest.approx(4 / 7)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", "x", "--benchmarks", "mvbench", "--judge", url])
    with pytest.raises(ValueError, match="none of the chosen benchmarks is judged"):
        evaluate.main()
