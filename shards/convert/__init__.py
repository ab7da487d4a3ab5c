"""Converters: pure functions from the rows of one example to `Example`s, parametrised by a catalog row.

A converter gets the rows of one group (one row, if the catalog row has no `group_by`) and its options; these and
the fields that it may read are declared in `shards.catalog.converters`. It yields examples, and an `Omitted` for
everything that is left out by the catalog's rules; it raises a `RejectedError` for a faulty group. It reads no files
except headers of images and annotations of AI2D, and draws only from
`Group.generators`, anew for each text variant of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from shards.convert.chats import chat
from shards.convert.common import Group, Omitted
from shards.convert.diagrams import diagram_choice
from shards.convert.image_annotations import image_caption, image_points, multi_image_points
from shards.convert.image_questions import identity_qa, image_chat, image_choice, image_qa
from shards.convert.video_annotations import video_caption, video_points, video_track
from shards.convert.video_questions import video_conversation, video_embedded_choice, video_qa, video_spans
from shards.schema import Example

Converter = Callable[[Group, Any], Iterator[Example | Omitted]]  # the options are the model of the same name

CONVERTERS: dict[str, Converter] = {
    converter.__name__: converter
    for converter in (
        chat,
        diagram_choice,
        identity_qa,
        image_caption,
        image_chat,
        image_choice,
        image_points,
        image_qa,
        multi_image_points,
        video_caption,
        video_conversation,
        video_embedded_choice,
        video_points,
        video_qa,
        video_spans,
        video_track,
    )
}
