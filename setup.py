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
DEMO = [*DICOM, "matplotlib==3.11.2", "nilearn==0.14.1", "tokenizers==0.23.3"]
TENSORBOARD = ["tensorboard==2.21.0"]
WANDB = ["wandb==0.31.0"]
DEEPSPEED = ["deepspeed==0.19.8"]
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
    install_requires=[
        "torch==2.13.0",
        "transformers==5.23.0",
        "safetensors==0.8.0",
        "numpy==2.4.6",
        "pillow==13.0.0",
        "pyyaml==6.0.3",
        "rich==15.0.0",
        "scikit-image==0.26.0",
        "scipy==1.17.1",
    ],
    extras_require={
        "demo": DEMO,
        "dev": [
            *DEMO,
            *TENSORBOARD,
            *WANDB,
            *DEEPSPEED,
            *LORA,
            "mypy==2.4.1",
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.6",
            "types-PyYAML==6.0.12.20261113",
        ],
        "deepspeed": DEEPSPEED,
        "dicom": DICOM,
        "lora": LORA,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
    },
)
