"""Requests for parts of a file, all of the same state of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from experimance_controlnet.catalog.answers import Part, Whole
from experimance_controlnet.catalog.job import Job
from experimance_controlnet.catalog.partial import Identity, Span
from experimance_controlnet.catalog.web import Answer


def range_header(span: Span) -> dict[str, str]:
    """Ask for a span."""
    return {"Range": f"bytes={span[0]}-{span[1] - 1}"}


class PartRequests:
    """Asks for parts of one state of a file; ``url`` may be where the origin redirected to."""

    def __init__(self, job: Job, identity: Identity, url: str, conditional: bool = True) -> None:
        self._job = job
        self._identity = identity
        self._url = url
        self._conditional = conditional

    def at(self, url: str) -> PartRequests:
        """The same at another address."""
        return PartRequests(self._job, self._identity, url, self._conditional)

    @contextmanager
    def get(self, span: Span) -> Iterator[Answer | None]:
        """The answer that holds just this span; None: the file is not the one that was begun."""
        if self._conditional:
            with self._send(span, {"If-Range": self._identity.version}) as answer:
                if not isinstance(answer.meaning, Whole):
                    yield answer if self._fits(answer, span) else None
                    return
            # the file has changed; or the origin sends all of it whenever there is a condition
        with self._send(span, {}) as answer:
            fits = self._fits(answer, span)
            self._conditional = self._conditional and not fits
            yield answer if fits else None

    @contextmanager
    def _send(self, span: Span, condition: Mapping[str, str]) -> Iterator[Answer]:
        order, headers = self._job.order, {**range_header(span), **condition}
        with self._job.web.get(order.label, self._url, headers, home_url=order.url) as answer:
            yield answer

    def _fits(self, answer: Answer, span: Span) -> bool:
        identity = self._identity
        return answer.meaning == Part(*span, identity.size_bytes, identity.version)
