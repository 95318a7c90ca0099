"""Objects that Ray Tune must not save: it pickles all that it is given for a resume of its own, which is never used."""

from __future__ import annotations


class NotPickled:
    """Mixin of objects that belong to the process of a study: pickled as a plain `object`."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()
