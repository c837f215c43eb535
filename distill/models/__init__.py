"""The ground floor: the contract of language models, and the ways to find, open and save weights and tokenizers."""
