"""The language model: loading, LoRA adapters, forward hooks, and what alignment changed in the weights."""
