"""The same samples in a real S3 server on this machine that answers 50 ms late, for `bench_loader.py`.

Everything goes through a proxy that hands on what a client sends 50 ms late, and knows nothing of HTTP; it and the
server are processes of their own. Peers read as their documentation says for an endpoint. Energon is absent: it reads
buckets through profiles of another package.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loader_peers import Stream

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "shards"))

from s3_server import BUCKET, client, environment, free_ports, s3_server, upload  # noqa: E402

from shards.layout import VisualLayout  # noqa: E402
from shards.stream.loader import make_loader  # noqa: E402
from shards.stream.mixture import MixtureSpec  # noqa: E402
from shards.stream.plan import Cursor, PlanSettings, open_plan  # noqa: E402

LATENCY = 0.05  # seconds
VALID = 3600  # seconds of a presigned URL
FORMATS = {"ours": "ours", "mds": "mds", "litdata": "litdata"}
# name in the table: (workers, what make_loader is told)
OURS: dict[str, tuple[int, dict[str, Any]]] = {
    "ours": (0, {"cache": 1 << 32}),  # as recipes have it by default
    "ours, no shard kept": (0, {}),
    "ours, nothing ahead": (0, {"read_ahead": 0}),
    "ours, 2 workers": (2, {"cache": 1 << 32}),
}


async def _serve_late(port: int, target: int) -> None:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", target)

        async def hand_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, pause: float) -> None:
            try:
                while data := await source.read(1 << 18):
                    await asyncio.sleep(pause)
                    sink.write(data)
                    await sink.drain()
            except OSError:  # one of both has gone
                pass
            sink.close()

        await asyncio.gather(hand_on(reader, back, LATENCY), hand_on(there, writer, 0.0))

    async with await asyncio.start_server(connect, "127.0.0.1", port) as server:
        await server.serve_forever()


def serve_late(port: int, target: int) -> None:
    """Entry of the proxy's process."""
    asyncio.run(_serve_late(port, target))


@contextmanager
def far_bucket(folder: Path) -> Iterator[dict[str, str]]:
    """Upload what `folder` holds and yield the variables with which a process reads it from afar."""
    (folder / "server").mkdir()
    with s3_server(folder / "server") as endpoint:
        for name in FORMATS.values():
            upload(endpoint, folder / name, name)
        (port,) = free_ports(1)
        proxy = multiprocessing.Process(target=serve_late, args=(port, int(endpoint.rsplit(":", 1)[1])), daemon=True)
        proxy.start()
        far = f"http://127.0.0.1:{port}"
        try:
            urls = [
                client(far).generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": key}, VALID)
                for key in (f"ours/bench/{path.name}" for path in sorted((folder / "ours/bench").glob("*.tar")))
            ]
            cache = {"XDG_CACHE_HOME": str(folder / "cache"), "FAR_CACHE": str(folder / "cache")}
            yield environment(far) | cache | {"S3_ENDPOINT_URL": far, "FAR_URLS": json.dumps(urls), "FAR": BUCKET}
        finally:
            proxy.kill()
            proxy.join()


def ours_far(layout: VisualLayout, name: str) -> Stream:
    """Packed batches from the bucket; one item per sample."""
    mixture = MixtureSpec.model_validate({"groups": {"all": {"rate": 1, "datasets": {"bench": None}}}})
    settings = PlanSettings(sequence_length=5120, max_crops=64, packs_per_step=1, window=1024)
    plan = open_plan([f"s3://{BUCKET}/ours"], mixture, settings)
    workers, options = OURS[name]
    at = Cursor()
    for batch in make_loader(plan, at, layout, workers=workers, prefetch=4, **options):
        yield from [batch] * sum(len(pack.draws) for pack in plan.step(at).packs)
        at = batch.cursor
