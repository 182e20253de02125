# SPDX-License-Identifier: Apache-2.0
"""Templates: every value is escaped, none is forgotten, and an installed package has the files."""

import subprocess
import sys
from pathlib import Path

import jinja2
import pytest

from rapid_jax.runtime.templates import render

ROOT = Path(__file__).resolve().parents[2]
PAGES = [("rapid_jax", "trace.html"), ("rapid_jax", "report.html"), ("longpo_jax", "report.html")]
HOSTILE = "<script>alert('1')</script>\"&{{ 7 * 7 }}"


def test_a_value_is_shown_as_it_is_and_means_nothing():
    page = render("longpo_jax", "report.html", title=HOSTILE, keys=[HOSTILE], runs=[], curves='"><b>')
    assert page.count("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&#34;&amp;{{ 7 * 7 }}") == 3
    assert "<script" not in page and "49" not in page
    assert 'src="&#34;&gt;&lt;b&gt;"' in page


@pytest.mark.parametrize(("package", "name"), PAGES)
def test_a_value_that_is_not_given_is_an_error(package: str, name: str):
    with pytest.raises(jinja2.UndefinedError):
        render(package, name)


def test_no_template_marks_a_value_as_safe():
    for path in ROOT.glob("*_jax/templates/*.html"):
        assert "safe" not in path.read_text(encoding="utf-8"), path


def test_an_installed_package_has_every_template(tmp_path: Path):
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "base")]
    command += ["build_py", "--build-lib", str(tmp_path / "lib"), "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = {path.relative_to(ROOT) for path in ROOT.glob("*_jax/**/templates/*")}
    assert len(found) >= 7
    assert [path for path in found if not (tmp_path / "lib" / path).is_file()] == []
