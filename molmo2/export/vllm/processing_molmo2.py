"""Molmo2's processor for vLLM: images and videos become patches and pooling indices, and a prompt becomes ids.

It is copied into an export for vLLM: the versions of transformers that vLLM allows have no Molmo2. It needs torch,
numpy, Pillow and transformers, but not torchvision. Tiling follows vLLM's own code, which counts the tokens of an
image a second time.

Names in shapes: N crops or frames, S side of a crop in pixels, P patches of a crop, T visual tokens, K patches that one
token pools.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor

IMAGE, VIDEO = "<|image|>", "<|video|>"  # placeholders in a prompt

Pixels = npt.NDArray[np.uint8]


def to_array(image: Any) -> Pixels:
    """An image as uint8 [H, W, 3]: upright by its EXIF orientation, and transparent parts white, as in training.

    `image` is a PIL image, or an array or tensor [H, W, 3] or [3, H, W].
    """
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image).convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        return np.asarray(Image.alpha_composite(white, upright).convert("RGB"))
    array = np.asarray(image)
    return array.transpose(1, 2, 0) if array.shape[-1] != 3 else array


def resize(frames: Pixels, height: int, width: int) -> Tensor:
    """Resize uint8 [N, H, W, 3] bilinearly without antialiasing: float32 whole numbers [N, 3, height, width]."""
    pixels = torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float()
    if pixels.shape[-2:] != (height, width):
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
    return pixels.round_().clamp_(0, 255)


def to_patches(settings: Any, crops: Tensor) -> Tensor:
    """Normalize crops [N, 3, S, S] of 0 to 255 and cut them into patches [N, P, patch * patch * 3]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
    count, channels, side, _ = crops.shape
    patch = settings.patch_size
    across = side // patch
    pixels = ((crops / 255 - mean) / std).reshape(count, channels, across, patch, across, patch)
    return pixels.permute(0, 2, 4, 3, 5, 1).reshape(count, across**2, patch**2 * channels)


def pool(grid: Tensor, window: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Group a grid of patch indices into windows.

    Returns:
        Pooling indices [T, K], -1 where a window is larger than what is left of the grid; and the rows and columns of
        windows.
    """
    high, wide = window
    missing_rows, missing_cols = -grid.shape[0] % high, -grid.shape[1] % wide
    padding = (missing_cols // 2, -(-missing_cols // 2), missing_rows // 2, -(-missing_rows // 2))
    padded = F.pad(grid, padding, value=-1)
    rows, cols = padded.shape[0] // high, padded.shape[1] // wide
    return padded.reshape(rows, high, cols, wide).permute(0, 2, 1, 3).reshape(rows * cols, high * wide), [rows, cols]


def crop_grid(settings: Any) -> Tensor:
    """The indices of the patches of one crop, [rows, columns]."""
    across = settings.size["height"] // settings.patch_size
    return torch.arange(across**2).reshape(across, across)


def choose_tiling(height: int, width: int, window: int, max_crops: int) -> tuple[int, int]:
    """The rows and columns of crops that need the least upscaling, or the least downscaling if all downscale.

    `height` and `width` are the image's, without the overlap margins; `window` is the side of a crop without them.
    """
    pairs = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    pairs.sort(key=lambda pair: (pair[0] * pair[1], pair[0]))
    inner = np.array([height, width], np.float32)
    # float32, since vLLM decides near-ties in float32.
    scales = ((np.array(pairs, np.int32) * window).astype(np.float32) / inner).min(axis=-1)
    best = scales.argmax() if (scales < 1).all() else np.where(scales < 1, np.float32(10e9), scales).argmin()
    return pairs[int(best)]


class Molmo2ImageProcessor(BaseImageProcessor):
    """Images become one crop of the whole image and crops of a tiling, which overlap.

    The pooling indices of every image count from its own first patch: vLLM adds the offsets of a batch.
    """

    model_input_names = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")

    def preprocess(self, images: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """Process one image or a list of them."""
        images = images if isinstance(images, (list, tuple)) else [images]
        pixels, pooling, grids = zip(*(self.process(to_array(image)) for image in images), strict=True)
        data = {
            "pixel_values": torch.cat(pixels),
            "image_token_pooling": torch.cat(pooling),
            "image_grids": torch.tensor(grids),
            "image_num_crops": torch.tensor([len(crops) for crops in pixels]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    __call__ = preprocess

    def process(self, image: Pixels) -> tuple[Tensor, Tensor, list[int]]:
        """Patches [N, P, ...], pooling indices [T, K], and the grids: rows and columns of the whole, then of tiles."""
        side, patch = self.size["height"], self.patch_size
        left, right = self.overlap_margins
        margin = (left + right) * patch
        window = side - margin
        rows, cols = choose_tiling(image.shape[0] - margin, image.shape[1] - margin, window, self.max_crops)
        canvas = resize(image[None], rows * window + margin, cols * window + margin)
        tiles = canvas[0].unfold(1, side, window).unfold(2, side, window)
        tiles = tiles.permute(1, 2, 0, 3, 4).reshape(rows * cols, 3, side, side)
        whole = crop_grid(self)
        low, low_shape = pool(whole, self.pooling_size)
        high, high_shape = pool(self.canvas_grid(rows, cols), self.pooling_size)
        pooling = torch.cat([low, torch.where(high >= 0, high + whole.numel(), -1)])
        crops = torch.cat([resize(image[None], side, side), tiles])
        return to_patches(self, crops), pooling, [*low_shape, *high_shape]

    def canvas_grid(self, rows: int, cols: int) -> Tensor:
        """Which patch of which tile shows a place of the canvas: the margins between two tiles are left out."""
        left, right = self.overlap_margins
        whole = crop_grid(self)
        index = torch.arange(rows * cols * whole.numel()).reshape(rows, cols, *whole.shape)
        index[1:, :, :left] = -1
        index[:, 1:, :, :left] = -1
        index[:-1, :, whole.shape[0] - right :] = -1
        index[:, :-1, :, whole.shape[1] - right :] = -1
        index = index.permute(0, 2, 1, 3).reshape(rows * whole.shape[0], cols * whole.shape[1])
        kept_rows, kept_cols = (index >= 0).any(dim=1), (index >= 0).any(dim=0)
        return index[kept_rows][:, kept_cols]


class Molmo2VideoProcessor(BaseVideoProcessor):
    """Frames become one crop each; the pooling indices count from the first frame's first patch."""

    model_input_names = ("pixel_values_videos", "video_token_pooling", "video_grids")

    def sample(self, num_frames: int, fps: float) -> list[int]:
        """Molmo2's "uniform_last_frame": frames at `max_fps` and the last, or evenly spaced ones in a long video."""
        if num_frames <= 2:
            return list(range(num_frames))
        if num_frames / fps > (self.num_frames - 1) / self.max_fps:
            return [int(i) for i in np.linspace(0, num_frames - 1, min(self.num_frames, num_frames))]
        indices = np.round(np.arange(0.0, num_frames - 1, fps / self.max_fps)).astype(int).tolist()
        return [*indices, num_frames - 1] if indices[-1] != num_frames - 1 else list(indices)

    def preprocess(self, videos: Any, return_tensors: str | None = None, **_: Any) -> BatchFeature:
        """Process a list with one video; its frames are an array [N, H, W, 3] or a list of images."""
        (frames,) = videos
        side = self.size["height"]
        crops = resize(np.stack([to_array(frame) for frame in frames]), side, side)
        whole = crop_grid(self)
        window, shape = pool(whole, self.pooling_size)
        starts = torch.arange(len(crops))[:, None, None] * whole.numel()
        data = {
            "pixel_values_videos": to_patches(self, crops),
            "video_token_pooling": torch.where(window >= 0, window + starts, -1).flatten(0, 1),
            "video_grids": torch.tensor([[len(crops), *shape]]),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    __call__ = preprocess


class Molmo2Processor(ProcessorMixin):
    """A prompt with placeholders and its media become ids, patches and pooling indices."""

    def __init__(
        self,
        image_processor: Any = None,
        video_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_use_col_tokens: bool = True,
        use_single_crop_col_tokens: bool | None = None,
        use_single_crop_start_token: bool = True,
        video_use_col_tokens: bool = False,
        use_frame_special_tokens: bool = True,
        **_: Any,
    ) -> None:
        self.image_token, self.video_token = IMAGE, VIDEO
        self.image_use_col_tokens = image_use_col_tokens
        self.use_single_crop_col_tokens = use_single_crop_col_tokens
        self.use_single_crop_start_token = use_single_crop_start_token
        self.video_use_col_tokens = video_use_col_tokens
        self.use_frame_special_tokens = use_frame_special_tokens
        super().__init__(image_processor, video_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        return_tensors: str | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Process one prompt, or several of equal length; BOS is put in front where it is missing.

        Args:
            images: the images of all placeholders, in order.
            text: prompts with placeholders.
            videos: [[frames]], as vLLM passes the one video that a prompt may have.
            video_metadata: [[facts]] with `fps` and, for frames that are not sampled here, `frames_indices`.
            do_sample_frames: `videos` has all frames of the file; take those that training would.
            return_tensors: "pt", or None for lists of ids.
        """
        prompts = [text] if isinstance(text, str) else list(text or [])
        data: dict[str, Any] = {}
        if images is not None and len(images):
            data |= self.image_processor(images)
            prompts = fill(prompts, IMAGE, map(self.image_string, data["image_grids"].tolist()))
        if videos is not None and len(videos):
            [[frames]], [[facts]] = videos, video_metadata
            if do_sample_frames:
                indices = self.video_processor.sample(len(frames), facts.fps)
                frames = [frames[index] for index in indices]
            else:
                indices = list(facts.frames_indices)
            data |= self.video_processor([frames])
            times = [index / facts.fps for index in indices]
            prompts = fill(prompts, VIDEO, iter([self.video_string(data["video_grids"][0].tolist(), times)]))
        bos = self.tokenizer.bos_token or self.tokenizer.eos_token
        prompts = [prompt if prompt.startswith(bos) else bos + prompt for prompt in prompts]
        data["input_ids"] = [self.tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
        return BatchFeature(data, tensor_type=return_tensors)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """Accept every part: the check of transformers fails where torchvision is not installed."""
        return type(argument)

    def image_string(self, grid: Sequence[int]) -> str:
        """What stands for an image: the whole of it, then its tiles row by row."""
        low_rows, low_cols, rows, cols = grid
        single = self.use_single_crop_col_tokens
        low_end = self.image_use_col_tokens if single is None else single
        low = rows_string(low_rows, low_cols, low_end)
        start = "<low_res_im_start>" if self.use_single_crop_start_token else "<im_start>"
        return f"{start}{low}<im_end><im_start>{rows_string(rows, cols, self.image_use_col_tokens)}<im_end>"

    def video_string(self, grid: Sequence[int], times: Sequence[float]) -> str:
        """What stands for a video: each frame's time in seconds, then the frame."""
        _, rows, cols = grid
        start, end = ("<frame_start>", "<frame_end>") if self.use_frame_special_tokens else ("<im_start>", "<im_end>")
        frame = f"{start}{rows_string(rows, cols, self.video_use_col_tokens)}{end}"
        return " ".join(f"{time:.1f} {frame}" for time in times)


def rows_string(rows: int, cols: int, column_tokens: bool) -> str:
    """Visual tokens of a grid; with `column_tokens`, every row ends with one."""
    return ("<im_patch>" * cols + "<im_col>" * int(column_tokens)) * rows


def fill(prompts: Sequence[str], placeholder: str, strings: Iterable[str]) -> list[str]:
    """Replace every placeholder by the next string."""
    strings = iter(strings)
    filled = []
    for prompt in prompts:
        first, *others = prompt.split(placeholder)
        filled.append(first + "".join(next(strings) + other for other in others))
    return filled
