"""A model writes: prompts become texts, stored with the token ids that were written."""
