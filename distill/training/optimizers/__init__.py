"""AdamW in all its memory sizes, its learning rate, and its step inside the backward pass."""
