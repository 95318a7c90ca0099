"""Colour profiles: pictures in other colour spaces than sRGB are converted, as every viewer shows them."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # of the profile -> mode
SAME = 2  # largest difference in 8-bit values at which a profile counts as sRGB: they differ in their rounding


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert a picture (L, RGB or CMYK, others by way of RGB) by its profile to sRGB, L if it was grey.

    None if the profile is damaged or of another colour space than the picture.
    """
    is_grey = image.mode in ("1", "L")
    try:
        space, transform = _transform(profile)
        if (space == "L" and not is_grey) or (space == "CMYK") != (image.mode == "CMYK"):
            return None
        colours = image if image.mode == space else image.convert(space)
        converted = ImageCms.applyTransform(colours, transform) if transform else colours
    except Exception:  # Pillow and LittleCMS raise many kinds on damaged profiles
        return None
    return converted.convert("L") if is_grey and converted is not None else converted


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode of a profile's colour space and its transform to sRGB; None if that changes nothing.

    Without the cache of one pixel that LittleCMS keeps by default, threads can share a transform.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = _SPACES[source.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.NOCACHE | ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    return mode, None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(18, -1, 3)
    probe = Image.fromarray(cube if mode == "RGB" else cube[:, :, 0].copy())
    changed = np.asarray(ImageCms.applyTransform(probe, transform), int)
    return bool(abs(changed - np.asarray(probe.convert("RGB"), int)).max() <= SAME)
