"""Package metadata; the build system and tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

DICOM = [
    "nibabel==5.4.2",
    "pydicom==3.0.2",
    "pylibjpeg[all]==2.1.0",
    "pylibjpeg-libjpeg==2.5.0",
    "pylibjpeg-openjpeg==2.6.0",
    "pylibjpeg-rle==2.2.0",
]
APP = ["gradio==6.31.0"]
DEMO = [*DICOM, "matplotlib==3.11.2", "nilearn==0.14.1", "tokenizers==0.23.3"]
TENSORBOARD = ["tensorboard==2.21.0"]
WANDB = ["wandb==0.31.0"]
DEEPSPEED = ["deepspeed==0.19.8"]
PARQUET = ["pyarrow==26.0.1"]
LORA = ["accelerate==1.15.0", "peft==0.21.2"]

setup(
    name="bagel-restore",
    version="0.1.0",
    description="Fine-tuning of BAGEL for medical image restoration",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=["modeling*", "data*", "train*", "inference_pipeline*", "scripts*"]
    ),
    package_data={"inference_pipeline": ["report.html"]},
    install_requires=[
        "torch==2.13.0",
        "transformers==5.23.0",
        "safetensors==0.8.0",
        "nltk==3.10.4",
        "rouge-score==0.1.2",
        "sacrebleu==2.6.0",
        "fsspec==2026.9.0",
        "numpy==2.4.6",
        "pillow==12.3.0",
        "pyyaml==6.0.3",
        "rich==15.0.0",
        "scikit-image==0.26.0",
        "scipy==1.17.1",
    ],
    extras_require={
        "app": APP,
        "demo": DEMO,
        "dev": [
            *APP,
            *DEMO,
            *TENSORBOARD,
            *WANDB,
            *DEEPSPEED,
            *LORA,
            *PARQUET,
            "mypy==2.4.1",
            "playwright==1.65.2",
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.6",
            "types-PyYAML==6.0.12.20261113",
        ],
        "deepspeed": DEEPSPEED,
        "dicom": DICOM,
        "lora": LORA,
        "parquet": PARQUET,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
    },
)
