"""Exports of a finished student in the formats that others open: Hugging Face, GGUF, ONNX. Each is checked."""
