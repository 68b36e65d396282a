"""The language model: loading, LoRA adapters, forward hooks, and the weight changes of alignment."""
