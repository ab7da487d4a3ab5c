"""The published evaluations of Molmo2: a benchmark for each, or the reason why there is none.

The datasets are rows of the catalog "molmo2-eval". Further inputs of a metric (`answers`, `masks`, `fps`, ...) are
`facts` of the catalog row, under the names in the metric's docstring.
"""

from __future__ import annotations

from typing import Final

from molmo2.eval.benchmark import Benchmark
from molmo2.eval.metrics.caption_scores import cider, rouge_l
from molmo2.eval.metrics.point_scores import all_in_mask, count_close, point_f1, video_point_f1
from molmo2.eval.metrics.scores import Metric, count_exact, multiple_choice
from molmo2.eval.metrics.text_scores import anls, answer_or_choice, direct_answer, relaxed_accuracy, vqa_accuracy
from molmo2.eval.metrics.track_scores import hota, track_f1

# Maximum length of an answer by kind of question, in tokens.
CHOICE_TOKENS: Final = 32
COUNT_TOKENS: Final = 192
POINT_TOKENS: Final = 256
VIDEO_TOKENS: Final = 2048
TRACK_TOKENS: Final = 4096


def _short(dataset: str, metric: Metric) -> Benchmark:
    return Benchmark(name=dataset, dataset=dataset, metric=metric)


def _choice(dataset: str, metric: Metric = multiple_choice) -> Benchmark:
    return Benchmark(name=dataset, dataset=dataset, metric=metric, max_new_tokens=CHOICE_TOKENS)


def _count(dataset: str, metric: Metric = count_exact, suffix: str = "", tokens: int = COUNT_TOKENS) -> Benchmark:
    return Benchmark(name=dataset + suffix, dataset=dataset, metric=metric, max_new_tokens=tokens)


def _track(dataset: str) -> Benchmark:
    return Benchmark(
        name=dataset,
        dataset=dataset,
        metric=track_f1,
        max_new_tokens=TRACK_TOKENS,
        corpus=(hota,),
    )


IMAGE = (
    _short("vqa-v2", vqa_accuracy),
    _short("text-vqa", vqa_accuracy),
    _short("chart-qa", relaxed_accuracy),
    _short("doc-qa", anls),
    _short("info-qa", anls),
    _choice("ai2d"),
    _choice("a-okvqa"),
    _short("a-okvqa-da", direct_answer),
    _choice("mmmu", answer_or_choice),
    _choice("real-world-qa", answer_or_choice),
    _choice("math-vista", answer_or_choice),
    _count("pixmo-count"),
    _count("count-bench-qa"),
)

MULTI_IMAGE = (_choice("muir-bench"), _choice("mmiu"), _choice("blink"))

VIDEO = (
    *map(_choice, ("perception-test", "next-qa", "mvbench", "tomato", "motion-bench")),
    _choice("temp-compass", answer_or_choice),
    _choice("temporal-bench", answer_or_choice),
    *map(_choice, ("ego-schema", "video-mme", "long-video-bench", "lvbench", "mlvu", "video-eval-pro")),
    Benchmark(
        name="molmo2-cap-eval",
        dataset="molmo2-cap-eval",
        metric=rouge_l,
        max_new_tokens=VIDEO_TOKENS,
        corpus=(cider,),
    ),
)

POINTING = (
    Benchmark(
        name="pixmo-points-eval",
        dataset="pixmo-points-eval",
        metric=point_f1,
        max_new_tokens=POINT_TOKENS,
    ),
    Benchmark(
        name="point-bench",
        dataset="point-bench",
        metric=all_in_mask,
        max_new_tokens=POINT_TOKENS,
    ),
    _count("molmo2-video-count-eval", tokens=VIDEO_TOKENS),
    _count("molmo2-video-count-eval", count_close, suffix="-close", tokens=VIDEO_TOKENS),
    Benchmark(
        name="molmo2-video-point-eval",
        dataset="molmo2-video-point-eval",
        metric=video_point_f1,
        max_new_tokens=VIDEO_TOKENS,
    ),
)

TRACKING = tuple(map(_track, ("mevis", "ref-yt-vos", "molmo2-video-track-eval", "ref-davis17", "reason-vos")))

_LOSS = "its evaluation is the loss of its held-out rows; use --loss {0}"
_SCREEN = "evaluates MolmoPoint, not Molmo2, and the unit of its boxes is not documented, so a score would be a guess"

WITHOUT: Final = {
    "pixmo-cap": _LOSS.format("pixmo-cap"),
    "pixmo-ask-model-anything": _LOSS.format("pixmo-ask-model-anything"),
    "llava-video-academic": _LOSS.format("llava-video-academic"),
    "screen-spot-v2": _SCREEN,
    "screen-spot-pro": _SCREEN,
    "os-world-g": _SCREEN,
}
