# SPDX-License-Identifier: Apache-2.0
"""The shape of the packages: which part may import which, how long files and functions are, what an import may do."""

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES, FUNCTION_LINES = 300, 60

RUNTIME = {"rapid_jax.runtime"}
ATTENTION = RUNTIME | {"rapid_jax.attention"}
MODEL = ATTENTION | {"rapid_jax.model"}
RETRIEVAL = MODEL | {"rapid_jax.retrieval"}
SPECULATIVE = MODEL | {"rapid_jax.speculative"}
FACADE_PARTS = {f"rapid_jax.{name}" for name in ("config", "conversation", "prompts", "answer", "identity", "engine")}
FACADE = RETRIEVAL | SPECULATIVE | FACADE_PARTS | {"rapid_jax.rapid"}
ASKING = {f"rapid_jax.{name}" for name in ("documents", "questions", "answer_options", "summary", "trace")}
TOOLS = {"rapid_jax.evaluate", "rapid_jax.bench", "rapid_jax.plan"}

# part -> the parts it may import besides itself; `rapid_jax` is the package's __init__, which every part may import.
MAY_IMPORT = {
    "rapid_jax": FACADE,
    "rapid_jax.runtime": set(),
    "rapid_jax.attention": RUNTIME,
    "rapid_jax.model": ATTENTION,
    "rapid_jax.retrieval": MODEL,
    "rapid_jax.speculative": MODEL,
    "rapid_jax.config": RETRIEVAL | SPECULATIVE,
    "rapid_jax.conversation": MODEL,
    "rapid_jax.prompts": RETRIEVAL | SPECULATIVE | {"rapid_jax.config", "rapid_jax.conversation"},
    "rapid_jax.answer": RETRIEVAL | SPECULATIVE | {"rapid_jax.conversation", "rapid_jax.prompts"},
    "rapid_jax.engine": RETRIEVAL | SPECULATIVE | FACADE_PARTS,
    "rapid_jax.identity": RETRIEVAL | {"rapid_jax.config", "rapid_jax.prompts"},
    "rapid_jax.rapid": FACADE,
    "rapid_jax.html_text": set(),
    "rapid_jax.documents": RUNTIME | {"rapid_jax.html_text"},
    "rapid_jax.trace": RETRIEVAL | SPECULATIVE | FACADE_PARTS,
    "rapid_jax.baselines": FACADE,
    "rapid_jax.evaluate": FACADE,
    "rapid_jax.bench": FACADE | {"rapid_jax.plan", "rapid_jax.evaluate"},  # its shapes and costs; its figures
    "rapid_jax.plan": FACADE,
    "rapid_jax.questions": RUNTIME | {"rapid_jax.documents"},
    "rapid_jax.summary": RETRIEVAL | SPECULATIVE | FACADE_PARTS,
    "rapid_jax.answer_options": RUNTIME | {"rapid_jax.config", "rapid_jax.documents"},
    "rapid_jax.answer_command": FACADE | ASKING | {"rapid_jax.baselines"},
    "rapid_jax.chat_session": FACADE,
    "rapid_jax.chat_command": FACADE | ASKING | {"rapid_jax.chat_session"},
    "rapid_jax.cache_command": RETRIEVAL | SPECULATIVE | {"rapid_jax.config"},
    "rapid_jax.serve": FACADE | {f"rapid_jax.{name}" for name in ("documents", "answer_options")},
    "rapid_jax.cli": RUNTIME
    | TOOLS
    | {f"rapid_jax.{name}_command" for name in ("answer", "chat", "cache")}
    | {"rapid_jax.serve", "rapid_jax.model"},  # rapid convert
    "rapid_jax.__main__": {"rapid_jax.cli"},
    "longpo_jax": SPECULATIVE | {"rapid_jax.plan"},
}
# package -> the only files that may import it, inside a function or not
ONLY_IN = {
    "tensorflow": {"longpo_jax.tasks"},
    "seqio": {"longpo_jax.tasks"},
    "scann": {"rapid_jax.retrieval.index"},
    "torch": set(),
    "transformers": set(),
}
# What makes an array or asks for devices when called; types and their limits (jnp.finfo, jnp.dtype) do neither.
DEVICE_CALLS = ("jax.numpy.", "jnp.", "jax.random.", "jax.device", "jax.local_device", "jax.default_backend")
DEVICE_CALLS += ("jax.process_", "jax.make_mesh", "jax.set_mesh", "jax.eval_shape", "jax.nn.")
HARMLESS_CALLS = ("jnp.finfo", "jnp.iinfo", "jnp.dtype", "jax.numpy.finfo", "jax.numpy.iinfo", "jax.numpy.dtype")
HARMLESS_CALLS += ("jax.nn.initializers.",)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The row of MAY_IMPORT that a module belongs to."""
    return "longpo_jax" if module.split(".")[0] == "longpo_jax" else ".".join(module.split(".")[:2])


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that is imported anywhere in the file, by statement or by a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` for the expression a.b.c, else the empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the file is imported: all but the bodies of functions."""
    yield node
    for name, value in ast.iter_fields(node):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and name == "body":
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from at_import(child)


def import_faults(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    part = part_of(module)
    if part not in MAY_IMPORT:
        yield f"{module} is in no part that MAY_IMPORT of tests/test_architecture.py lists"
        return
    for line, name in imported(tree, module, is_package):
        top = name.split(".")[0]
        if top in ONLY_IN and module not in ONLY_IN[top]:
            yield f"{module}:{line} imports {name}, which only {sorted(ONLY_IN[top]) or 'tests'} may"
        if top not in ("rapid_jax", "longpo_jax"):
            continue
        target = part_of(name)
        into_init = top == "rapid_jax" and target not in MAY_IMPORT  # a name that rapid_jax/__init__.py defines
        if target != part and not into_init and target != "rapid_jax" and target not in MAY_IMPORT[part]:
            yield f"{module}:{line} imports {name}, and {part} may not import {target}"


def effect_faults(tree: ast.AST, module: str) -> Iterator[str]:
    for node in at_import(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.environb"):
            yield f"{module}:{node.lineno} reads the environment when imported"
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        ):
            yield f"{module}:{node.lineno} imports the environment by name: use os.environ, inside a function"
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            if called == "os.getenv":
                yield f"{module}:{node.lineno} reads the environment when imported"
            elif called.startswith(DEVICE_CALLS) and not called.startswith(HARMLESS_CALLS):
                yield f"{module}:{node.lineno} calls {called} when imported"


def length_faults(text: str, tree: ast.AST, module: str) -> Iterator[str]:
    lines = len(text.splitlines())
    if lines > FILE_LINES:
        yield f"{module} has {lines} lines, more than {FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{module}:{node.lineno} {node.name} has {length} lines, more than {FUNCTION_LINES}"


def faults(text: str, module: str, is_package: bool = False) -> list[str]:
    tree = ast.parse(text)
    return [
        *import_faults(tree, module, is_package),
        *effect_faults(tree, module),
        *length_faults(text, tree, module),
    ]


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_the_packages_keep_the_rules():
    paths = sources("rapid_jax", "longpo_jax")
    assert len(paths) > 8
    found = []
    for path in paths:
        found += faults(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_every_file_names_its_licence_first():
    paths = [*sources("rapid_jax", "longpo_jax", "tests", "launch"), ROOT / "setup.py"]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    wrong = [
        path for path, text in texts.items() if text and not text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("rapid_jax.runtime.mesh", "from rapid_jax.attention import ring"),
        ("rapid_jax.attention.ring", "import rapid_jax.model.decoder"),
        ("rapid_jax.model.decoder", "from rapid_jax import speculative"),
        ("rapid_jax.retrieval.index", "def f():\n    from rapid_jax.speculative import loop"),
        ("rapid_jax.speculative.loop", "from ..retrieval import index"),
        ("rapid_jax.speculative.loop", "from .. import retrieval"),
        ("rapid_jax.speculative.loop", "import importlib\nx = importlib.import_module('rapid_jax.retrieval.index')"),
        ("rapid_jax.rapid", "import rapid_jax.cli"),
        ("rapid_jax.bench", "from rapid_jax import cli"),
        ("rapid_jax.cli", "from longpo_jax import round"),
        ("longpo_jax.round", "from rapid_jax.retrieval import chunk"),
        ("longpo_jax.round", "from rapid_jax import rapid"),
        ("rapid_jax.mystery", "x = 1"),
        ("rapid_jax.retrieval.embed", "def f():\n    import torch"),
        ("rapid_jax.retrieval.embed", "import scann"),
        ("longpo_jax.batch", "import seqio"),
        ("rapid_jax.retrieval.index", "from tensorflow import data"),
        ("rapid_jax.runtime.mesh", "import os\nX = os.environ.get('X')"),
        ("rapid_jax.runtime.mesh", "import os\ndef f(x=os.getenv('X')):\n    pass"),
        ("rapid_jax.runtime.mesh", "from os import environ"),
        ("rapid_jax.runtime.mesh", "import jax\nclass A:\n    n = jax.device_count()"),
        ("rapid_jax.runtime.mesh", "import jax.numpy as jnp\nZERO = jnp.zeros(())"),
        ("rapid_jax.runtime.mesh", "import jax\nKEY = jax.random.key(0)"),
        ("rapid_jax.runtime.mesh", "x = 1\n" * 301),
        ("rapid_jax.runtime.mesh", "def f():\n" + "    x = 1\n" * 60),
    ],
)
def test_a_breach_is_found(module: str, text: str):
    assert len(faults(text, module)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("rapid_jax.runtime.mesh", "import os\ndef f():\n    return os.environ['X']"),
        (
            "rapid_jax.runtime.mesh",
            "from .errors import InputError\nfrom . import files\nfrom rapid_jax import __version__",
        ),
        ("rapid_jax.attention.ring", "import jax.numpy as jnp\nLOW = float(jnp.finfo(jnp.float32).min)"),
        ("rapid_jax.rapid", "from rapid_jax.retrieval import index\nfrom rapid_jax.speculative import loop"),
        ("rapid_jax.cli", "def f():\n    import rapid_jax.bench"),
        ("rapid_jax.retrieval.index", "import sys\ndef f():\n    sys.modules['tensorflow'] = None\n    import scann"),
        ("longpo_jax.tasks", "import seqio\nimport tensorflow as tf"),
        ("longpo_jax.round", "from rapid_jax.speculative import loop\nfrom longpo_jax import pairs"),
        ("rapid_jax.runtime.mesh", "x = 1\n" * 300),
        ("rapid_jax.runtime.mesh", "def f():\n" + "    x = 1\n" * 59),
    ],
)
def test_what_is_allowed_is_not_called_a_breach(module: str, text: str):
    assert faults(text, module) == []


def test_relative_imports_of_a_package_start_at_the_package():
    assert faults("from . import loop\nfrom ..runtime import files", "rapid_jax.speculative", is_package=True) == []
    assert len(faults("from ..retrieval import index", "rapid_jax.speculative", is_package=True)) == 1


IMPORT_ALL = """
    import importlib, pkgutil, sys
    package, *forbidden = sys.argv[1:]
    root = importlib.import_module(package)
    names = [module.name for module in pkgutil.walk_packages(root.__path__, package + ".")]
    for name in names:
        if not name.endswith(".__main__"):
            importlib.import_module(name)
    found = [name for name in forbidden if name in sys.modules]
    if "jax" in sys.modules:
        from jax._src import xla_bridge
        if xla_bridge.backends_are_initialized():
            found.append("a jax backend")
    print(len(names), *found, sep="\\n")
"""


def import_all(package: str, *forbidden: str, path: Path = ROOT) -> tuple[int, list[str]]:
    """How many modules a fresh interpreter finds below `package`, and what it should not have loaded or started."""
    command = [sys.executable, "-c", textwrap.dedent(IMPORT_ALL), package, *forbidden]
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path, check=False)
    assert done.returncode == 0, done.stderr
    count, *found = done.stdout.splitlines()
    return int(count), found


def test_importing_rapid_jax_loads_no_other_framework_and_starts_no_device():
    count, found = import_all("rapid_jax", "tensorflow", "seqio", "torch", "transformers", "scann")
    assert count == len(sources("rapid_jax")) - 1
    assert found == []


@pytest.mark.parametrize("module", ["rapid_jax.runtime.settings", "rapid_jax.cli", "longpo_jax.cli"])
def test_settings_and_options_are_read_without_jax_and_numpy(module):
    heavy = "'jax', 'numpy', 'ml_dtypes', 'tensorstore', 'gcsfs', 's3fs'"
    program = f"import sys, {module}; sys.exit(str(sorted({{{heavy}}} & set(sys.modules))).strip('[]'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_a_heavy_import_and_a_started_device_are_found(tmp_path: Path):
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").touch()
    (tmp_path / "heavy" / "below.py").write_text("import colorsys\nimport jax\njax.devices()\n")
    assert import_all("heavy", "colorsys", "wave", path=tmp_path) == (1, ["colorsys", "a jax backend"])
