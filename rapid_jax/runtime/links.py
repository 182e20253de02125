# SPDX-License-Identifier: Apache-2.0
"""A name for a folder that lies elsewhere: a symbolic link on this machine, in a bucket an object NAME.link.

Both say where from the folder that they are in, so a tree with links in it may be moved or copied as a whole.
"""

import os
import posixpath
from pathlib import Path
from typing import Final

from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import replace_file
from rapid_jax.runtime.storage import AnyPlace, BucketPlace, bytes_of, working_place

_LINK: Final = ".link"


def make_link(name: AnyPlace, target: AnyPlace) -> None:
    """Makes `name` stand for `target`. Raises InputError if anything else is there."""
    if isinstance(name, Path):
        relative = os.path.relpath(str(target), name.parent)
        if name.is_symlink() and os.readlink(name) == relative:
            return
        if not os.path.lexists(name):
            name.parent.mkdir(parents=True, exist_ok=True)
            name.symlink_to(relative)
            return
    elif (there := target_of(name)) == target:
        return
    elif there is None and not name.exists():
        assert isinstance(target, BucketPlace)
        with replace_file(_object_of(name)) as temporary:
            temporary.write_text(posixpath.relpath(target.key, name.parent.key or "."), encoding="utf-8")
        return
    raise InputError(f"{name}: expected a link to {target}, got something else")


def target_of(name: AnyPlace) -> AnyPlace | None:
    """What a link leads to, be it there or not; None where there is no link of that name.

    Raises InputError for one in a bucket that leads out of it, to itself or to a folder that it is in.
    """
    if isinstance(name, Path):
        return name.resolve() if name.is_symlink() else None
    place = _object_of(name)
    if (data := bytes_of(place)) is None:
        return None
    key = posixpath.normpath(posixpath.join(name.parent.key, data.decode("utf-8", "replace")))
    leads_up = key == "." or f"{name.key}/".startswith(f"{key}/")  # to a folder that the link is in, or to itself
    if leads_up or key.startswith(("..", "/")) or not key.isprintable():
        raise InputError(f"{place}: expected the name of another folder of this bucket, got {data[:60]!a}")
    return working_place(f"{name.scheme}://{name.bucket}/{key}", str(place))


def follow_link(name: AnyPlace) -> AnyPlace:
    """The folder of that name, or the one that a link of that name leads to; where a path leads the system finds."""
    return name if isinstance(name, Path) else target_of(name) or name


def _object_of(name: BucketPlace) -> BucketPlace:
    return name.parent / f"{name.name}{_LINK}"
