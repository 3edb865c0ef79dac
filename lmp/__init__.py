"""lmp: distributed pretraining of long-range multimodal transformers over films."""

__version__ = "0.1.0"
