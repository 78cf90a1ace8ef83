"""Corpora, tokenizers, shards and the loader. Training needs only `data.shards`; preparing anything but bytes needs the extra
`data` of pyproject.toml. Command line: `python -m data --help`."""
