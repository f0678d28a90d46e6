"""Package metadata; the settings of the tools stand in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

setup(
    name="llava-prune",
    version="0.1.0",
    description="Training-free visual token pruning for LLaVA, AutoPrune first",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["llava_prune", "llava_prune.*"]),
    package_data={
        "llava_prune": ["py.typed", "eval/*.yaml", "eval/tasks/*.yaml", "report/published/*.yaml", "report/page/*"],
    },
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.4",
        "transformers>=5.14,<6",
        "tokenizers",
        "packaging",
        "safetensors",
        "numpy",
        "Pillow",
        "PyYAML",
        "rich",
        "shortuuid",
        "sentencepiece",
        "protobuf",
        "openpyxl",
    ],
    extras_require={
        # what importing haotian-liu/LLaVA (llava-torch, installed with --no-deps) takes beyond the above
        "llava": ["accelerate", "requests", "tqdm"],
        "flash": ["flash-attn>=2.5"],
        "deepspeed": ["deepspeed>=0.19"],
        "quant": ["bitsandbytes>=0.50"],
        "lmms-eval": ["lmms-eval>=0.7"],
        "report": ["jinja2>=3.1", "matplotlib>=3.7", "pandas>=2.2"],
        # not a part of dev: gradio wants a Pillow older than that of constraints.txt
        "demo": ["gradio>=6.31,<7"],
        "dev": [
            "ruff",
            "mypy",
            "types-PyYAML",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "jinja2>=3.1",
            "matplotlib>=3.7",
            "pandas>=2.2",
            "playwright>=1.45",
            "peft>=0.17",
            "accelerate",
            "bitsandbytes>=0.50",
            "deepspeed>=0.19",
            "fastapi",
            "uvicorn",
        ],
        # tests of llava_prune.experimental; a CUDA build of torch brings its own triton, which satisfies this
        "experimental": ["triton>=3.3; platform_system == 'Linux' and platform_machine == 'x86_64'"],
    },
    entry_points={"console_scripts": ["llava-prune = llava_prune.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
