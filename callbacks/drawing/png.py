"""Images as bytes."""

from __future__ import annotations

from io import BytesIO

from torch import Tensor


def png(picture: Tensor) -> bytes:
    """Encode an image of shape ``(3, height, width)``, uint8, as a PNG, in grey where it has no colour.

    That is quick and light, not as small as can be: pictures are drawn while a model waits.
    """
    from PIL import Image

    _, height, width = picture.shape
    if picture[0].equal(picture[1]) and picture[0].equal(picture[2]):
        image = Image.frombytes("L", (width, height), picture[0].contiguous().numpy().tobytes())
    else:
        image = Image.frombytes("RGB", (width, height), picture.permute(1, 2, 0).contiguous().numpy().tobytes())
    encoded = BytesIO()
    image.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()
