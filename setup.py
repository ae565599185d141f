"""Packaging; pyproject.toml holds the settings of the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "torch_flash2/_version.py").read_text())
assert VERSION is not None

setup(
    name="torch_flash2",
    version=VERSION[1],
    description="A pure Python FlashAttention library for PyTorch with Triton kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The torch_flash2 authors",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["torch_flash2", "torch_flash2.*"]), "torch_flash2_autoload"],
    package_dir={"torch_flash2_autoload": "torch_flash2/autoload"},
    # PyTorch loads these when it is imported; the module must cost nothing.
    entry_points={"torch.backends": ["torch_flash2 = torch_flash2_autoload:autoload"]},
    package_data={"": ["py.typed", "*.json"]},
    install_requires=["torch>=2.11"],
    extras_require={
        "test": [
            "expecttest",
            "hypothesis",
            "numpy",
            "pytest",
            "triton>=3.6; sys_platform == 'linux'",
        ],
        "demo": ["matplotlib"],
        "transformers": ["transformers>=5.17"],
        "dev": ["mypy", "ruff"],
    },
    classifiers=[
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
