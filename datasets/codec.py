"""Pictures -> square uint8 arrays <-> the bytes of packed images.

Legend: H height, W width, C channels (1 grey, 3 RGB).
"""

from __future__ import annotations

import io
from typing import Literal, get_args

import numpy as np
import simplejpeg
from PIL import Image

from ..errors import first_line

Crop = Literal["center", "pad", "none"]  # or a number of pixels
ImageFormat = Literal["jpeg", "png", "webp"]
CROPS: tuple[str, ...] = get_args(Crop)
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # as webdataset's decoders know them


class BadImage(ValueError):
    """Bytes that are not a usable image; the message has the reason."""


def fit(image: Image.Image, resolution: int, channels: int, crop: str) -> np.ndarray:
    """Fit `image` to a uint8 array [resolution, resolution, C], with antialiased Lanczos resampling.

    crop: `center` cuts the largest central square and resizes it; `pad` shrinks (never enlarges) the
    whole image to fit and centres it on black; `none` accepts square images only; a number cuts the central
    square of so many pixels, and refuses images that are smaller.
    """
    image = image.convert("L" if channels == 1 else "RGB")
    width, height = image.size
    if crop == "none" and width != height:
        raise BadImage(f"{width} x {height} is not square and crop=none; use crop=center or crop=pad")
    side = int(crop) if crop.isdecimal() else min(width, height)
    if side > min(width, height):
        raise BadImage(f"{width} x {height} is smaller than crop={crop}; use a smaller crop")
    if crop == "pad":
        scale = min(1.0, resolution / max(width, height))
        image = _resize(image, max(1, round(width * scale)), max(1, round(height * scale)))
        canvas = Image.new(image.mode, (resolution, resolution))
        canvas.paste(image, ((resolution - image.width) // 2, (resolution - image.height) // 2))
        image = canvas
    else:
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side)) if (side, side) != (width, height) else image
        image = _resize(image, resolution, resolution)
    return np.asarray(image).reshape(resolution, resolution, channels)


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def encode(img_HWC: np.ndarray, image_format: str, quality: int) -> bytes:
    """Encode `img_HWC` (uint8) as JPEG without chroma subsampling, as PNG, or as lossy WebP."""
    channels = img_HWC.shape[2]
    if image_format == "jpeg":
        colour, sampling = ("GRAY", "Gray") if channels == 1 else ("RGB", "444")
        return simplejpeg.encode_jpeg(np.ascontiguousarray(img_HWC), quality, colour, sampling)
    buffer = io.BytesIO()
    image = Image.fromarray(img_HWC[:, :, 0] if channels == 1 else img_HWC)
    if image_format == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def decode_packed(data: bytes, resolution: int, channels: int, image_format: str) -> np.ndarray:
    """Decode a packed image to contiguous uint8 [C, H, W].

    Raises:
        BadImage: not a readable image of the packed size and format.
    """
    try:
        if image_format == "jpeg":
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(width, height, resolution)
            img_HWC = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")
        else:
            image = Image.open(io.BytesIO(data), formats=(image_format.upper(),))
            _check_size(*image.size, resolution)
            mode = "L" if channels == 1 else "RGB"
            img_HWC = np.asarray(image.convert(mode)).reshape(resolution, resolution, channels)
    except BadImage:
        raise
    except Exception as error:  # as above
        raise BadImage(f"not a readable {image_format} image ({first_line(error)})") from error
    return np.ascontiguousarray(img_HWC.transpose(2, 0, 1))


def _check_size(width: int, height: int, resolution: int) -> None:
    if (width, height) != (resolution, resolution):
        raise BadImage(f"the image is {width} x {height}, not {resolution} x {resolution}")
