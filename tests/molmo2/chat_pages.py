"""What tests do on the chat page in a browser: ask, wait for the video, measure where points are drawn."""

from typing import Any

import pytest


def converse(page: Any, text: str, number: int) -> None:
    """Ask a question, the `number`-th of the page, and wait for the end of its answer."""
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector(f"body[data-answered='{number}']", timeout=60_000)


def wait_for_time(page: Any, seconds: float) -> None:
    """Wait until the page's video stands at a time."""
    reached = (
        "at => { const v = document.querySelector('video'); return !v.seeking && Math.abs(v.currentTime - at) < .05 }"
    )
    for _ in range(200):  # not wait_for_function, whose polling evaluates a string, which the page's policy forbids
        if page.evaluate(reached, seconds):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"the video was not sought to {seconds} s")


def centres(page: Any) -> list[tuple[float, float]]:
    """Centres of the circles on the picture or video, as fractions of its width and height."""
    box = page.locator("figure img, figure video").first.bounding_box()
    drawn = [circle.bounding_box() for circle in page.locator("figure circle").all()]
    return [
        (
            round((c["x"] + c["width"] / 2 - box["x"]) / box["width"], 2),
            round((c["y"] + c["height"] / 2 - box["y"]) / box["height"], 2),
        )
        for c in drawn
    ]
