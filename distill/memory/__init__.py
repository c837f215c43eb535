"""The forecast: the real step and the real teacher run on tensors without memory, and what they take is added up."""
