"""What a pretrained model is worth: retrieval, probes, and the report of both."""
