"""The embedded world: small instruction tasks, a hidden grader, a tokenizer and data files.

It lets the whole program run anywhere with nothing downloaded. `files.write_world` writes
a directory of ordinary JSONL files and an ordinary Hugging Face directory (without
weights); the rest of the program reads them as it reads any user's model and data.
"""
