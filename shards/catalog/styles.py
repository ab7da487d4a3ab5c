"""The styles of questions that have a meaning: an option of a catalog row that names another one is a mistake.

A style that no question is written for stands before the question in the prompt ("vqa2: What is it?"), so a misspelt
one would be trained. `molmo2.processing.prompts` renders them; `styles` of a catalog adds names of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from shards.catalog.nearest import did_you_mean

MOST_LISTED = 10  # styles that an error lists by name
# Options of converters that hold a style, several, or a mapping of them.
STYLE_OPTIONS = ("style", "open_style", "styles", "ask_some")

# Styles by what they ask for.
KINDS: dict[str, frozenset[str]] = {
    name: frozenset(styles.split())
    for name, styles in {
        "captions of images": "long_caption short_caption transcript",
        "points in an image": "count pointing point_count point_then_count count_then_point cosyn_point",
        "points in several images": "multi_image_pointing multi_image_counting multi_image_point_then_count "
        "multi_image_count_then_point",
        "points in a video": "video_count video_point video_point_count video_count_point",
        "tracks": "video_point_ground_start_end video_point_track_per_frame video_point_track_start_end "
        "video_single_point_track_per_frame video_single_point_track_start_end",
        "texts about a video": "video_long_caption video_short_caption video_motion_caption video_merged_caption "
        "video_transcript video_clip_short_caption_start_end video_clip_caption_start_end "
        "video_clip_caption_start_end_in_seconds video_clip_transcript_start_end "
        "video_clip_transcript_start_end_in_seconds video_frame_caption_timestamp "
        "video_frame_caption_timestamp_in_seconds video_object_caption video_short_answer",
        "answer options": "a_okvqa_mc ai2_diagram ai2_diagram_no_letter eval_multiple_choice mantis_instruct_mc "
        "science_qa video_multiple_choice",
        # the first three in natural language, explained answers about figures, and benchmarks, whose name stands
        # before the question
        "questions": "user_qa text_sft correction_qa cosyn_document cosyn_chart_exp cosyn_chemical_exp "
        "cosyn_diagram_exp cosyn_doc_exp cosyn_math_exp cosyn_music_exp cosyn_table_exp a_okvqa_da activitynet_label "
        "charades_sta chart_qa coin_label doc_qa dv_qa epic_kitchens_label eval_short_answer figure_qa info_qa "
        "kinetics_label moments_in_time_label okvqa plot_qa st_qa tabwmp_da tally_qa text_vqa vqa2 youcook2_label",
    }.items()
}
STYLES = frozenset[str]().union(*KINDS.values())
_IMAGE_TEXTS = ("questions", "captions of images")
_ALL_TEXTS = (*_IMAGE_TEXTS, "texts about a video")
# Option of a converter, or the converter for all of its options -> the kinds of styles that it can use.
USES: dict[str, tuple[str, ...]] = {
    "chat": _ALL_TEXTS,
    "identity_qa": _IMAGE_TEXTS,
    "image_caption": _IMAGE_TEXTS,
    "image_chat": _IMAGE_TEXTS,
    "image_choice.style": ("answer options", "questions"),
    "image_choice.open_style": _IMAGE_TEXTS,
    "image_points": ("points in an image",),
    "image_qa": _IMAGE_TEXTS,
    "multi_image_points": ("points in several images",),
    "video_conversation": ("questions", "texts about a video", "answer options"),
    "video_points": ("points in a video",),
    "video_qa": ("questions", "texts about a video"),
    "video_spans": ("questions", "texts about a video"),
    "video_track": ("tracks",),
}


def styles_in(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (option, style) for every style that the options of a row name."""
    for option in STYLE_OPTIONS:
        value = options.get(option)
        for style in [value] if isinstance(value, str) else list(value or ()):
            yield option, str(style)


def style_problems(
    converter: str, options: Mapping[str, Any], fields: Collection[str], own: Collection[str]
) -> Iterator[str]:
    """Yield what is wrong with the styles that the options of a row name: unknown ones, and those of another kind.

    Args:
        converter: the row's converter.
        options: its options.
        fields: the fields that the row has columns for; captions without the field `question` are asked for by their
            style.
        own: styles that the catalog adds.
    """
    for option, style in styles_in(options):
        if style in own:
            continue
        if style not in STYLES:
            hint = did_you_mean(style, sorted(STYLES | set(own)))
            yield (
                f"options.{option}: no style {style!r}; {hint}docs/reference-styles.md lists all; "
                "write a style of your own into `styles` of the catalog"
            )
            continue
        kinds = USES.get(f"{converter}.{option}") or USES.get(converter, tuple(KINDS))
        if converter == "image_caption" and "question" not in fields:
            kinds = ("captions of images",)
        if not any(style in KINDS[kind] for kind in kinds):
            suited = sorted(name for kind in kinds for name in KINDS[kind])
            kind = next(name for name, styles in KINDS.items() if style in styles)
            near = did_you_mean(style, suited)
            listed = f"use {', '.join(suited)}" if len(suited) < MOST_LISTED else "docs/reference-styles.md lists all"
            yield (
                f"options.{option}: style {style!r} is one of {kind}, and converter {converter} "
                f"has {' or '.join(kinds)}; {near}{listed}"
            )
