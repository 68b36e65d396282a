"""Lisa: lazy safety alignment of language models against harmful fine-tuning, on Lightning and Hydra."""

__version__ = "0.1.0"
