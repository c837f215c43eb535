"""A finished student in the formats that others open: Hugging Face, GGUF, ONNX; written, checked, then named."""
