"""Corpora, tokenizers, shards and the loader. Training needs only `data.shards`; preparing needs data/requirements.txt
for anything but bytes. Command line: `python -m data --help`."""
