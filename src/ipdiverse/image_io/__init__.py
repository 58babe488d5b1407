"""Safe decoding of images from anywhere, with one stated policy for each oddity.

| in the wild | policy |
|---|---|
| format | JPEG, PNG and WebP, told by content; all others are refused |
| wrong extension | accepted when the content is one of these formats |
| size of the file | at most 64 MiB, checked before reading |
| size of the image | sides 16 to 16384 px, at most 40 megapixels, checked before decoding |
| decompression bomb | refused by the line above, before memory is taken for pixels |
| JPEG of very many scans | refused: each one costs a pass over the whole image |
| EXIF orientation | applied; EXIF that cannot be read is ignored |
| CMYK | to sRGB by the file's ICC profile; without a usable one, Pillow's conversion |
| ICC profile of an RGB image | ignored, as stock diffusers pipelines do |
| 16-bit grey | divided by 257 and rounded; Pillow's own conversion would clip |
| 16-bit colour | the upper byte, as Pillow reads it |
| palette, grey, 1-bit | converted to RGB |
| transparency of any kind | composited over white |
| animated PNG or WebP | the first frame, with an `ImageWarning` |
| several pictures in one JPEG (MPO) | the first; the others are depth maps, previews and the like |
| truncated, corrupt, empty | refused |
| folder, pipe, device, missing, unreadable | refused |
| metadata (EXIF, ICC, text) | never carried over to the decoded image |

A refusal is always one `ImageError` line. Pillow's process-wide `LOAD_TRUNCATED_IMAGES`, which is
off unless some library turns it on, would let truncated files through.
"""

from ipdiverse.image_io.decode import (
    ImageWarning,
    content_hash,
    load_image,
    load_image_bytes,
    to_rgb,
)
from ipdiverse.image_io.limits import (
    MAX_FILE_BYTES,
    MAX_PIXELS,
    MAX_SIDE,
    MIN_SIDE,
)

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "MAX_SIDE",
    "MIN_SIDE",
    "ImageWarning",
    "content_hash",
    "load_image",
    "load_image_bytes",
    "to_rgb",
]
