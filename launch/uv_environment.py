# SPDX-License-Identifier: Apache-2.0
"""Prints the environment in which uv looks for packages where pip would: `NAME=value` lines for the shell to export.

uv reads neither pip's configuration files nor the PIP_ variables, so a machine whose packages come from a mirror or a
folder of wheels would be passed over. Uses the standard library alone: it runs before anything is installed.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlparse

# pip option -> uv variable, separator between several values
OPTIONS = {
    "find-links": ("UV_FIND_LINKS", ","),
    "index-url": ("UV_INDEX_URL", " "),
    "extra-index-url": ("UV_EXTRA_INDEX_URL", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
}
SECTIONS = ("global", "install", ":env:")  # in pip the later of these wins


def settings_of(listing: str) -> dict[str, list[str]]:
    """The values of each option in the output of `pip config list`, the section that pip would obey alone."""
    found: dict[str, tuple[int, list[str]]] = {}
    for line in listing.splitlines():
        match = re.fullmatch(r"(global|install|:env:)\.([a-z-]+)=('.*'|\".*\")", line.strip())
        if not match:
            continue
        section, option, text = match.groups()
        rank = SECTIONS.index(section)
        if option not in found or rank >= found[option][0]:
            found[option] = (rank, ast.literal_eval(text).split())
    return {option: values for option, (_, values) in found.items()}


def is_there(place: str) -> bool:
    """False for a local folder or file that does not exist; pip passes over those and uv stops at them."""
    url = urlparse(place)
    if url.scheme == "file":
        return Path(unquote(url.path)).exists()
    return bool(url.scheme) or Path(place).expanduser().exists()


def uv_environment(listing: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to set for uv, given pip's settings; a variable that the user has set already stands."""
    variables = {}
    for option, values in settings_of(listing).items():
        name, separator = OPTIONS.get(option, ("", ""))
        present = values if option == "trusted-host" else [value for value in values if is_there(value)]
        if name and present and not environment.get(name):
            variables[name] = separator.join(present)
    if "UV_EXTRA_INDEX_URL" in variables and not environment.get("UV_INDEX_STRATEGY"):
        # pip weighs the versions of all indexes; uv on its own would stop at the first index that has the package.
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return variables


if __name__ == "__main__":
    pip = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
    for name, value in uv_environment(listing, os.environ).items():
        print(f"{name}={value}")
