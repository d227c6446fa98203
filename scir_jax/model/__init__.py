"""The language model: decoder, attention, log-probabilities, Hugging Face weights."""
