"""limbeck: score, prune, distil and prove hybrid Mamba-2/Transformer language models, in plain PyTorch."""

__version__ = "0.1.0"
