"""How the client wants its image: in JSON, or as the body itself, and in which format. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.exceptions import HTTPException

from experimance_controlnet.data_types import ControlNetGenerateData, ImageFormat
from experimance_controlnet.errors import InvalidRequestError
from experimance_controlnet.server.codec import MEDIA_TYPES

_FORMATS = {media_type: image_format for image_format, media_type in MEDIA_TYPES.items()}
_ANY_IMAGE = "image/*"
_JSON = ("application/json", "application/*", "*/*")


@dataclass(frozen=True, slots=True)
class Delivery:
    """``binary``: the body is the image and the metadata travel in headers."""

    binary: bool
    image_format: ImageFormat


def negotiate(accept: str | None, data: ControlNetGenerateData) -> Delivery:
    """What the Accept header and the body's fields ask for together.

    Of the media types that can be served the header's favourite decides: an image type makes the
    body binary, anything else leaves that to ``response_format``. A format named in the body wins
    among those that the header accepts.

    Raises:
        InvalidRequestError: header and body contradict each other.
        HTTPException: 406, the header accepts nothing that can be served.
    """
    favourites = [kind for kind in _by_preference(accept or "*/*") if _is_served(kind)]
    if not favourites:
        raise HTTPException(
            406, f"Accept must hold one of application/json, {', '.join(_FORMATS)}."
        )
    if favourites[0] in _JSON:
        return Delivery(data.response_format == "binary", data.wanted_format or "png")
    if data.num_images > 1:
        raise InvalidRequestError(
            "num_images", "An image as the body is one image; accept application/json for more."
        )
    return Delivery(True, _image_format(favourites, data.wanted_format))


def _image_format(favourites: list[str], wanted: ImageFormat | None) -> ImageFormat:
    accepted = [_FORMATS[kind] for kind in favourites if kind in _FORMATS]
    if wanted is None:
        return accepted[0] if accepted else "png"
    if wanted not in accepted and _ANY_IMAGE not in favourites and "*/*" not in favourites:
        raise InvalidRequestError(
            "output_format", f"It is {wanted}, but the Accept header asks for {accepted[0]}."
        )
    return wanted


def _is_served(kind: str) -> bool:
    return kind in _FORMATS or kind in _JSON or kind == _ANY_IMAGE


def _by_preference(accept: str) -> list[str]:
    """Media types by falling quality, equal ones in their order; refused ones (q=0) left out."""
    weighed = []
    for entry in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        quality = next((_number(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        weighed.append((quality, kind))
    return [kind for quality, kind in sorted(weighed, key=lambda pair: -pair[0]) if quality > 0]


def _number(text: str) -> float:
    """A quality; what cannot be read counts as refused."""
    try:
        return min(float(text), 1.0)
    except ValueError:
        return 0.0
