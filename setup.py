"""Packaging: the folders at the top of the repository are the modules ``ssast.<folder>``."""

from pathlib import Path

from setuptools import setup

FOLDERS = ("engine", "kernels", "pipelines", "benchmarks", "configs")
PACKAGES = [
    ".".join(("ssast", *path.parts))
    for folder in FOLDERS
    for path in (Path(folder), *sorted(Path(folder).rglob("*")))
    if path.is_dir() and path.name != "__pycache__"
]

setup(
    name="ssast-engine",
    version="0.1.0",
    description="Fast pretraining and fine-tuning of audio spectrogram transformers (SSAST, MSPM)",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.15",
    # Namespace packages: no folder has an __init__.py, so none can shadow a package of its name.
    packages=PACKAGES,
    package_dir={f"ssast.{folder}": folder for folder in FOLDERS},
    package_data={"ssast.configs": ["*.yaml"]},
    install_requires=[
        "torch>=2.13,<2.15",
        "triton>=3.7; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "deepspeed>=0.19.8,<0.20",
        "nvidia-dali-cuda130>=2.4,<3",
        "numpy>=2.0",
        "scipy>=1.14",
        "pyyaml>=6.0",
        "safetensors>=0.5",
        "soundfile>=0.13",
        "soxr>=0.5",
        "scikit-learn>=1.6",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
        "tqdm>=4.66",
        "fsspec>=2024.6",
        "psutil>=6.0",
        "pooch>=1.8",
        "requests>=2.32",
    ],
    extras_require={
        "flash": ["flash-attn>=2.8"],
        "bench": ["torchaudio>=2.11", "torchcodec>=0.10"],
        "hf": ["transformers>=5.0,<6", "huggingface_hub>=1.0"],
        "remote": ["universal-pathlib>=0.3"],
        "onnx": ["onnx>=1.19", "onnxscript>=0.5", "onnxruntime>=1.22"],
        "parquet": ["pyarrow>=17"],
        "lhotse": ["lhotse>=1.33"],
        "wandb": ["wandb>=0.31"],
        "trackio": ["trackio>=0.43"],
        "mteb": ["mteb[audio]>=2.26"],
        "xares": ["xares>=0.1.3", "torchcodec>=0.10"],
        "s3prl": ["espnet-s3prl>=2026.5"],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.8",
            "mypy>=1.13",
            "types-pyyaml",
            "types-requests",
            "accelerate>=1.10",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "lightning>=2.5",
            "webdataset>=1.0",
        ],
    },
    entry_points={"console_scripts": ["ssast = ssast.engine.cli.main:main"]},
)
