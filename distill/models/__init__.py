"""The ground floor: the contract of language models, and how to find, open and save their weights and tokenizers."""
