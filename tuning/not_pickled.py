"""Ray Tune writes out whatever it is given, so as to go on by itself; nothing of a study is read back."""

from __future__ import annotations


class NotKept:
    """Mixin of what belongs to the process of a study: written out as nothing."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()
