"""Mixin for objects that Ray Tune must not save: it pickles its arguments for its own resume, which is never used."""

from __future__ import annotations


class NotPickled:
    """Mixin for objects that are bound to the process of the study: pickled as a plain `object`."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()
