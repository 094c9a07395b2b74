"""Install `deit`: ranges that import together; constraints.txt holds the exact versions that were tested."""

import pathlib
import re

import setuptools

VERSION_FILE = pathlib.Path(__file__).parent / "deit" / "__init__.py"

REQUIRED = [
    "tensorflow>=2.15.1,<2.16",  # the last minor version that tensorflow-addons imports with
    "tf-keras>=2.15.1,<2.16",  # legacy Keras, of TensorFlow's own minor version
    "tensorflow-addons>=0.23,<0.24",  # AdamW; 0.23 is its last release
    "tensorflow-datasets>=4.9.10,<4.10",  # tf_flowers and other named data sets
    "tensorflow-metadata>=1.17,<1.18",  # of tensorflow-datasets; 1.18 wants protobuf 5, TensorFlow 4
    "importlib_resources>=6,<8",  # imported by tensorflow-datasets, which does not ask for it
    "array_record>=0.8,<0.9",  # random access to prepared data; its newest wants Python 3.11
    "absl-py>=2.1,<3",  # flags, logging
    "ml-collections>=1.0,<2",  # configurations
    "tensorboard>=2.15,<2.16",  # of TensorFlow's own minor version
    "setuptools>=70.1,<82",  # TensorBoard 2.15 imports pkg_resources, which setuptools 82 no longer has
    "h5py>=3.11,<4",  # Keras weights files
    "safetensors>=0.5,<1",  # the tensors of a checkpoint
    "tqdm>=4.66,<5",  # progress bars
    "matplotlib>=3.10,<4",  # the pictures in TensorBoard
    "pillow>=11,<13",  # decodes WebP and odd BMP, checks data sets, draws; matplotlib brings it anyway
    "scikit-learn>=1.7,<2",  # the embedded handwritten digits
    "numpy>=1.26,<2",  # TensorFlow 2.15 is compiled against NumPy 1
]

EXTRAS = {
    "gpu": ["tensorflow[and-cuda]>=2.15.1,<2.16"],  # CUDA 12.2 and cuDNN 8.9 as packages
    "peers": [  # tools/weight_parity.py, .pth files, and the tests against other code bases
        "torch>=2.13,<2.14",  # reads .pth files; the other two need it
        "torchvision>=0.28,<0.29",  # of torch's own minor version; timm imports it
        "timm>=1.0.31,<1.1",  # the reference of names and logits
        "transformers>=5.24,<6",  # the same for Hugging Face's layout
    ],
    "test": [
        "pytest>=8,<10",
        "pytest-timeout>=2.3,<3",  # a hanging test fails instead of stopping the suite
        "pytest-xdist>=3.6,<4",  # two test files at a time: half the time on two cores
        "scipy>=1.15,<2",  # distributions that random draws are held against; scikit-learn brings it anyway
        "ruff>=0.17,<0.18",  # another minor version may format otherwise
        "packaging>=24",  # compares the ranges above with constraints.txt
        "PyYAML>=6,<7",  # reads launch/kubernetes.yaml
        "kubernetes-validate>=1.31,<2",  # the schemas of Kubernetes, which that file is held against
        "kubeflow-training>=1.9,<2",  # the schema of its TFJob
    ],
}

if __name__ == "__main__":
    setuptools.setup(
        name="deit",
        version=re.search(r'^__version__ = "(.+)"$', VERSION_FILE.read_text(encoding="utf-8"), re.MULTILINE).group(1),
        description="Data-efficient image transformers by distillation, in TensorFlow.",
        license="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.10,<3.12",
        packages=setuptools.find_packages(include=["deit", "deit.*"]),
        install_requires=REQUIRED,
        extras_require=EXTRAS,
    )
