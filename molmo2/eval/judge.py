"""A language model that judges captions, behind any OpenAI-compatible endpoint (`tools/evaluate.py --judge URL`).

Replies are stored in a file by their request, so nothing is asked twice, also after a killed run. The key is the
environment variable `OPENAI_API_KEY`; it is sent if it is set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import urllib3

from shards.atomic import append_to
from shards.format import canonical_json

TIMEOUT: Final = 300.0  # seconds to wait for a reply
RETRIES: Final = 5  # how often a request is repeated that fails for a passing reason
BACKOFF = 1.0  # seconds before the second retry; the pause doubles
KEY_VARIABLE: Final = "OPENAI_API_KEY"

_STATEMENTS = """Split the caption into its single facts, each a short sentence that can be checked by itself.
Write one fact on each line, and nothing else. If the caption states no fact, write NONE.

Caption:
{caption}"""
_SUPPORTED = """Which of the numbered statements does the caption support? A statement is supported if the caption
says it or implies it. Write a line for each statement, in order: its number, a colon, and yes or no.

Caption:
{caption}

Statements:
{statements}"""
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_VERDICT = re.compile(r"^\W*(\d+)\W+(yes|no)\b", re.IGNORECASE | re.MULTILINE)


class Judge:
    """A judge at an endpoint. Threads may share it."""

    def __init__(self, url: str, cache: Path, model: str | None = None):
        """Connect to the endpoint.

        Args:
            url: the endpoint's base, such as http://localhost:8000/v1.
            cache: file of the stored replies, JSON lines; it is created.
            model: name of the model; None takes the first model of the endpoint's list.

        Raises:
            ValueError: the endpoint does not answer, or the cache is damaged.
        """
        self.url = url.rstrip("/")
        policy = urllib3.Retry(
            RETRIES, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None, backoff_factor=BACKOFF
        )
        self._http = urllib3.PoolManager(maxsize=32, retries=policy, timeout=TIMEOUT)
        self._lock, self.cache = threading.Lock(), cache
        self._replies = _read_replies(cache)
        self.model = model or str(self._send("GET", "/models")["data"][0]["id"])

    def statements(self, caption: str) -> list[str]:
        """The single facts that a caption states."""
        if not caption.strip():
            return []
        lines = [_BULLET.sub("", line).strip() for line in self._ask(_STATEMENTS.format(caption=caption)).splitlines()]
        return [line for line in lines if line and line.strip(".").upper() != "NONE"]

    def supported(self, statements: Sequence[str], caption: str) -> list[bool]:
        """Whether the caption supports each of the statements.

        Raises:
            ValueError: the reply has no verdict for one of them.
        """
        numbers = range(1, len(statements) + 1)
        numbered = "\n".join(f"{number}. {statement}" for number, statement in zip(numbers, statements, strict=True))

        def check(reply: str) -> None:
            if missing := [number for number in numbers if number not in _verdicts(reply)]:
                raise ValueError(
                    f"--judge {self.url}: no verdict on statement {missing[0]} of {len(statements)} in the reply "
                    f"{reply[:200]!r} of {self.model}; use a model that keeps to the form, or remove --judge"
                )

        verdicts = _verdicts(self._ask(_SUPPORTED.format(caption=caption, statements=numbered), check))
        return [verdicts[number] for number in numbers]

    def _ask(self, prompt: str, check: Callable[[str], None] = lambda reply: None) -> str:
        """The stored reply, or that of the endpoint, which is stored if it passes the check."""
        request = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        key = hashlib.sha256(canonical_json(request)).hexdigest()
        if (stored := self._replies.get(key)) is not None:
            return stored
        choice = self._send("POST", "/chat/completions", request)["choices"][0]
        reply = str(choice["message"]["content"] or "")
        check(reply)
        with self._lock, append_to(self.cache) as file:
            file.write(json.dumps({"request": key, "reply": reply}) + "\n")
            self._replies[key] = reply
        return reply

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {os.environ[KEY_VARIABLE]}"} if os.environ.get(KEY_VARIABLE) else {}
        try:
            reply = self._http.request(method, self.url + path, headers=headers, **({"json": body} if body else {}))
        except urllib3.exceptions.HTTPError as error:
            raise ValueError(
                f"--judge {self.url}: {error}; start the endpoint, then run the same command again"
            ) from None
        if reply.status != 200:
            text = reply.data.decode(errors="replace")[:300]
            raise ValueError(f"--judge {self.url}{path}: status {reply.status}: {text} (the key is ${KEY_VARIABLE})")
        try:
            return json.loads(reply.data)
        except ValueError:
            raise ValueError(f"--judge {self.url}{path}: the reply is not JSON; is the URL the API's base?") from None


def _verdicts(reply: str) -> dict[int, bool]:
    return {int(match[1]): match[2].lower() == "yes" for match in _VERDICT.finditer(reply)}


def _read_replies(path: Path) -> dict[str, str]:
    """The stored replies by their requests' hashes; a last line that a killed process left incomplete is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    try:
        lines = [json.loads(line) for line in data[:whole].splitlines()]
        return {line["request"]: line["reply"] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of replies ({error}); remove it") from None
