"""Hugging Face directories: safetensors and PEFT adapters, into shards and out."""
