"""The styles of questions that have a meaning: an option of a catalog row that names another one is a mistake.

A style that no question is written for stands before the question in the prompt ("vqa2: What is it?"), so a misspelt
one would be trained. `molmo2.processing.prompts` renders them; `styles` of a catalog adds names of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from shards.catalog.nearest import did_you_mean

# Options of converters that hold a style, several, or a mapping of them.
STYLE_OPTIONS = ("style", "open_style", "styles", "ask_some")

STYLES = frozenset(
    # questions in natural language
    "user_qa text_sft correction_qa long_caption short_caption transcript count pointing point_count point_then_count "
    "count_then_point multi_image_pointing multi_image_counting multi_image_point_then_count "
    "multi_image_count_then_point "
    # points on figures, and explained answers about them
    "cosyn_point cosyn_document cosyn_chart_exp cosyn_chemical_exp cosyn_diagram_exp cosyn_doc_exp cosyn_math_exp "
    "cosyn_music_exp cosyn_table_exp "
    # videos
    "video_long_caption video_short_caption video_motion_caption video_merged_caption video_transcript "
    "video_clip_short_caption_start_end video_clip_caption_start_end video_clip_caption_start_end_in_seconds "
    "video_clip_transcript_start_end video_clip_transcript_start_end_in_seconds video_frame_caption_timestamp "
    "video_frame_caption_timestamp_in_seconds video_object_caption video_short_answer video_multiple_choice "
    "video_count video_point video_point_count video_count_point video_point_ground_start_end "
    "video_point_track_per_frame video_point_track_start_end video_single_point_track_per_frame "
    "video_single_point_track_start_end "
    # benchmarks, whose name stands before the question
    "a_okvqa_da a_okvqa_mc activitynet_label ai2_diagram ai2_diagram_no_letter charades_sta chart_qa coin_label doc_qa "
    "dv_qa epic_kitchens_label eval_multiple_choice eval_short_answer figure_qa info_qa kinetics_label "
    "mantis_instruct_mc moments_in_time_label okvqa plot_qa science_qa st_qa tabwmp_da tally_qa text_vqa vqa2 "
    "youcook2_label".split()
)


def styles_in(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (option, style) for every style that the options of a row name."""
    for option in STYLE_OPTIONS:
        value = options.get(option)
        for style in [value] if isinstance(value, str) else list(value or ()):
            yield option, str(style)


def style_problems(options: Mapping[str, Any], own: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with the styles that the options of a row name; `own`: the catalog's `styles`."""
    for option, style in styles_in(options):
        if style not in STYLES and style not in own:
            hint = did_you_mean(style, sorted(STYLES | set(own)))
            yield (
                f"options.{option}: no style {style!r}; {hint}docs/reference-styles.md lists all; "
                "write a style of your own into `styles` of the catalog"
            )
