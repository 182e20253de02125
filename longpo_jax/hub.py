# SPDX-License-Identifier: Apache-2.0
"""An exported folder onto the Hugging Face hub, for `longpo export --push USER/NAME`."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rapid_jax.runtime.errors import InputError, extra, legible

_Found = TypeVar("_Found")
_LEFT_OUT = ("done.json",)  # the run's own


class Hub:
    """The hub as the one who is logged in sees it; a repository that is new is private.

    Raises InputError where huggingface_hub is not installed, nobody is logged in, the token is wrong, the name is none,
    or the hub cannot be reached.
    """

    def __init__(self, repository: str):
        try:
            from huggingface_hub import HfApi
            from huggingface_hub.utils import disable_progress_bars, get_token, validate_repo_id
        except ImportError as error:
            raise InputError(f"--push: expected the package huggingface_hub: {extra('hub')}") from error
        self._repository, self._api = repository, HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        if repository.count("/") != 1:
            raise InputError(f"--push: expected USER/NAME, got {repository!r}")
        self._asked(lambda: validate_repo_id(repository))
        if get_token() is None:
            raise InputError("--push: expected somebody to be logged in: `hf auth login`, or HF_TOKEN")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        disable_progress_bars()
        self._asked(self._api.whoami)

    def push(self, folder: Path, message: str) -> str:
        """Uploads what is in the folder as one commit, whole or not at all; the address of the repository."""
        self._asked(lambda: self._api.create_repo(self._repository, private=True, exist_ok=True))
        self._asked(
            lambda: self._api.upload_folder(
                repo_id=self._repository, folder_path=folder, commit_message=message, ignore_patterns=list(_LEFT_OUT)
            )
        )
        return f"{self._api.endpoint}/{self._repository}"

    def _asked(self, call: Callable[[], _Found]) -> _Found:
        """What the hub answers. Whatever goes wrong on the way there and back is one line."""
        try:
            return call()
        except Exception as error:  # of several libraries, with no class in common
            raise InputError(f"--push {self._repository}: {_said(error)}") from error


def _said(error: Exception) -> str:
    while not hasattr(error, "response") and isinstance(error.__cause__, Exception):  # what it was in the end
        error = error.__cause__
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "expected a token that the hub takes, got 401: `hf auth login`, or another HF_TOKEN"
    if status == 403:
        return "expected a token that may write there, got 403"
    if status is not None:
        return f"the hub answered {status}: {legible(str(error))[:200]}"
    return f"the hub could not be asked: {type(error).__name__}: {legible(str(error))[:200]}"
