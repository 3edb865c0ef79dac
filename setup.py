"""Packaging of lmp. `launch`, `tools`, `configs` and `slurm` are used from a checkout and not installed."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "films": ["av>=14", "scenedetect-headless>=0.7", "pysubs2>=1.8", "charset-normalizer>=3.4"],
    "report": ["matplotlib>=3.9", "scikit-learn>=1.5", "snowballstemmer>=2.2"],
    "gpu": ["flash-attn>=2.8"],
    "export": ["huggingface-hub>=0.30"],
    "bench": ["litdata>=0.2.50", "torchdata>=0.11"],
    "import": ["h5py>=3.10"],
    "features": ["h5py>=3.10", "lmdb>=1.5", "msgpack-numpy>=0.4.8", "pyarrow>=16"],
    "onnx": ["onnx>=1.18", "onnxruntime>=1.20", "onnxscript>=0.5"],
    "s3": ["s3fs>=2024.6"],
    "gcs": ["gcsfs>=2024.6"],
    "http": ["aiohttp>=3.9"],
    "hf": ["huggingface-hub>=0.30"],
}
EXTRAS["dev"] = [
    *EXTRAS["films"],
    *EXTRAS["report"],
    *EXTRAS["export"],
    *EXTRAS["import"],
    *EXTRAS["features"],
    *EXTRAS["onnx"],
    *EXTRAS["s3"],
    *EXTRAS["http"],
    "moto>=5.1",  # its server, of which `moto[server]` would bring parts for every other service too
    "flask>=3",
    "flask-cors>=5",
    "pytest>=8",
    "pytest-xdist>=3.7",
    "hypothesis>=6.100",
    "ruff>=0.12",
    "mypy>=1.16",
    "types-PyYAML",
    "pre-commit>=4",
]

setup(
    name="lmp",
    version="0.1.0",
    description="Distributed pretraining of long-range multimodal transformers over films",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["lmp", "lmp.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.8",
        "deepspeed==0.19.8",
        "transformers>=4.51",
        "webdataset>=1.0.2",
        "safetensors>=0.5",
        "numpy>=1.26",
        "fsspec>=2024.6",
        "pydantic>=2.10",
        "PyYAML>=6",
        "rich>=13.9",
        "tensorboard>=2.18",
        "submitit>=1.5.2",
        "psutil>=5.9",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["lmp = lmp.cli:main"]},
)
