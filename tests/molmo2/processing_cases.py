"""Small things that the processing tests share: a tokenizer, two layouts, transformers' processor beside ours."""

import functools
import io
import tempfile
from pathlib import Path

import av
import numpy as np
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from molmo2.processing.new_tokenizer import write_tokenizer
from molmo2.processing.processor import Processor
from molmo2.processing.tokenizer import Tokenizer
from shards.layout import VisualLayout, VisualTokens
from shards.schema import Annotation, Example, ImageRef, Limits, Source, VideoRef

BASE_VOCAB = 320
TEMPLATE = Path(__file__).parents[2] / "molmo2/processing/chat_template.jinja"
REAL = VisualLayout(
    tokens=VisualTokens.after(151936), crop_size=378, patch_size=14, overlap_margin=4, image_pool=2, video_pool=3
)
LIMITS = Limits(sequence_length=4096, max_crops=64, image_crops=4)


@functools.cache
def tokenizer_dir() -> str:
    """A byte-level tokenizer without merges: 256 symbols, three named tokens, fillers, Molmo2's tokens from 320."""
    directory = tempfile.mkdtemp(prefix="tokenizer-")
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    write_tokenizer(tokenizer, directory, BASE_VOCAB)
    return directory


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_dir(), BASE_VOCAB)


def tiny_layout(crop_size: int = 84, base_vocab: int = BASE_VOCAB) -> VisualLayout:
    return VisualLayout(
        tokens=VisualTokens.after(base_vocab),
        crop_size=crop_size,
        patch_size=14,
        overlap_margin=1,
        image_pool=2,
        video_pool=3,
    )


def tiny_processor(mode: str = "sft", num_variants: int = 4) -> Processor:
    return Processor(tiny_layout(), tiny_tokenizer(), mode, num_variants)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_ref(rgb: np.ndarray) -> ImageRef:
    """A lossless file, so that ours and theirs read equal pixels."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())


def example(*annotations: Annotation, key: str = "k", **fields) -> Example:
    return Example(key=key, dataset="d", source=Source(file="f", row=0), annotations=annotations, **fields)


@functools.cache
def reference_processor(directory: str | None = None):
    """transformers' Molmo2Processor with the geometry of `tiny_layout` and a tokenizer."""
    from transformers import AutoTokenizer
    from transformers.models.molmo2 import Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

    size = {"height": 84, "width": 84}
    return Molmo2Processor(
        Molmo2ImageProcessor(size=size, max_crops=4, overlap_margins=[1, 1]),
        Molmo2VideoProcessor(
            size=size,
            num_frames=8,
            max_fps=2,
            do_resize=True,
            do_rescale=True,
            do_normalize=True,
            do_convert_rgb=True,
            do_sample_frames=False,
        ),
        AutoTokenizer.from_pretrained(directory or tokenizer_dir()),
        chat_template=TEMPLATE.read_text(),
        use_single_crop_col_tokens=False,
    )


def write_video(path: Path, num_frames: int, fps: int, height: int = 48, width: int = 64) -> VideoRef:
    """An H.264 file whose frames grow brighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(num_frames):
            level = np.full((height, width, 3), 255 * i // num_frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(stream.encode())
    return VideoRef(path=str(path))
