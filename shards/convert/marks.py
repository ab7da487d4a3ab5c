"""The marks "<image>" and "<video>" in texts, with which LLaVA and others show the place of media.

All media come before the text, so a mark is removed, or becomes the name of its image if there are several. A text with
a mark that has no media is rejected: a model would learn to answer about what it cannot see.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from shards.convert.answer_options import named_images
from shards.convert.common import of_variants
from shards.schema import Annotation, Chat, Choice, Example, Points, RejectedError, Text, Turn

_MARK = re.compile(r"<(?:image|video)>")
_NUMBERED = re.compile(r"<(image|video) (\d+)>")
_LEADING = re.compile(r"(?:\s*<image>)+\s*")


def without_marks(example: Example) -> Example:
    """The example with the marks of its texts removed or replaced by names, see `texts_without_marks`.

    Raises:
        RejectedError: marks that do not fit the media, or a question that is only a mark.
    """
    annotations = tuple(_without_marks(a, len(example.images), example.video is not None) for a in example.annotations)
    return replace(example, annotations=annotations)


def texts_without_marks(texts: Sequence[str], num_images: int, video: bool) -> list[str]:
    """Remove the marks of the texts of one annotation; with several images, one inside a text becomes "Image 2".

    The mark of a video is "<video>", or "<image>" as in LLaVA-Video.

    Raises:
        RejectedError: the texts have marks, but another number than there are media; or a mark names none of them.
    """
    whole = "\n".join(texts)
    images, videos = whole.count("<image>"), whole.count("<video>")
    for kind, number in _NUMBERED.findall(whole):
        if kind == "video" or not 1 <= int(number) <= num_images:
            raise RejectedError(f'marks: "<{kind} {number}>" in a text about {num_images} images')
    if video and images + videos > 1:
        raise RejectedError(f'marks: "<image>" or "<video>" stands {images + videos} times in texts about one video')
    if not video and videos:
        raise RejectedError(f'marks: "<video>" stands {videos} times in texts without a video')
    if not video and images not in {0, num_images}:
        raise RejectedError(f'marks: "<image>" stands {images} times in texts about {num_images} images')
    if video or num_images == 1:
        return named_images([_MARK.sub("", text).strip() if _MARK.search(text) else text for text in texts])
    first = next((number for number, text in enumerate(texts) if "<image>" in text), 0)
    leading = _LEADING.match(texts[first]) if texts else None
    texts = [text[leading.end() :] if leading and number == first else text for number, text in enumerate(texts)]
    return named_images(texts, 1 + (leading[0].count("<image>") if leading else 0))


def _without_marks(annotation: Annotation, num_images: int, video: bool) -> Annotation:
    if annotation.other_variants:
        drawn = [replace(annotation, other_variants=()), *annotation.other_variants]
        return of_variants([_without_marks(variant, num_images, video) for variant in drawn])
    texts = _texts(annotation)
    if not any("<image" in text or "<video" in text for text in texts):
        return annotation
    plain = texts_without_marks(texts, num_images, video)
    if not isinstance(annotation, Chat) and any(old and not new for old, new in zip(texts, plain, strict=True)):
        raise RejectedError(f"a text that is only a mark: {texts}")
    if isinstance(annotation, Chat):
        turns = zip(annotation.turns, plain, strict=True)
        return replace(annotation, turns=tuple(Turn(role=turn.role, text=text) for turn, text in turns))
    if isinstance(annotation, Choice):
        return replace(annotation, question=plain[0], options=tuple(plain[1:]))
    if isinstance(annotation, Text):
        return replace(annotation, question=plain[0], answer=plain[1])
    if isinstance(annotation, Points):
        return replace(annotation, question=plain[0], label=plain[1])
    return replace(annotation, label=plain[0])


def _texts(annotation: Annotation) -> list[str]:
    if isinstance(annotation, Chat):
        return [turn.text for turn in annotation.turns]
    if isinstance(annotation, Choice):
        return [annotation.question, *annotation.options]
    if isinstance(annotation, Text):
        return [annotation.question, annotation.answer]
    if isinstance(annotation, Points):
        return [annotation.question, annotation.label]
    return [annotation.label]
