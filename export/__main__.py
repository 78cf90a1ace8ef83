"""Trained models for others: a folder that `transformers` loads, with tokenizer and model card.

    ./run.sh export --run runs/cpu/record-s0-1a2b3c4d --to hf OUT

A GPT-2 as published becomes a GPT2LMHeadModel; every other model is loaded with trust_remote_code by `modeling_speedrun.py`,
which is copied beside it.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

import hub
from data.tokenizers import Tokenizer
from engine.command import Parser, command
from engine.run_folder import atomic_write, read_json
from engine.spec import UsageError
from model import GPT
from sample import add_run, opened

CODE = Path(__file__).with_name("modeling_speedrun.py")


def write_speedrun(gpt: GPT, out: Path) -> None:
    """config.json, model.safetensors and the code that reads them, of any model of ours."""
    name = CODE.stem
    shape = asdict(gpt.config) | {"padded_vocab": gpt.config.padded_vocab}
    shape |= {"windows": [int(block.attention.window) for block in gpt.blocks]}  # as at the end of the run
    about = dict(model_type="speedrun_gpt", architectures=["SpeedrunGPT"], tie_word_embeddings=False, torch_dtype="float32")
    auto = {"AutoConfig": f"{name}.SpeedrunConfig", "AutoModelForCausalLM": f"{name}.SpeedrunGPT"}
    buffers = dict(cos=gpt.cos, sin=gpt.sin) if gpt.positions is None else {}
    weights = {f"model.{key}": value.float().contiguous().clone() for key, value in (gpt.state_dict() | buffers).items()}
    atomic_write(out / "config.json", json.dumps(about | {"auto_map": auto} | shape, indent=1))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    atomic_write(out / CODE.name, CODE.read_text())


def byte_characters() -> dict[str, int]:
    """The printable character by which GPT-2's byte-level encoding writes each byte -> the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> str:
    """What AutoTokenizer loads; returns a sentence for the model card."""
    if tokenizer.name == "gpt2":
        cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
        for cached, name in zip(tokenizer.CACHE, ("merges.txt", "vocab.json"), strict=True):
            atomic_write(out / name, (cache / cached).read_bytes())
        about = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    elif tokenizer.name == "bytes":
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        bpe = {"type": "BPE", "vocab": byte_characters(), "merges": []}
        parts = {"model": bpe, "pre_tokenizer": level, "decoder": level, "added_tokens": []}
        atomic_write(out / "tokenizer.json", json.dumps({"version": "1.0"} | parts))
        about = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
        return f"Its tokens are those of `{tokenizer.name}`, for which transformers has no tokenizer."
    atomic_write(out / "tokenizer_config.json", json.dumps(about, indent=1))
    return f"The tokenizer is `{tokenizer.name}`."


def card(run: Path, own_code: bool, of_tokens: str) -> str:
    """README.md of the folder: settings, figures, and how to load it."""
    config, result = read_json(run / "config.json"), read_json(run / "result.json") if (run / "result.json").exists() else {}
    trust = ", trust_remote_code=True" if own_code else ""
    figures = {"validation loss, nats per token": result.get("val_loss"), "tokens": result.get("tokens")}
    figures |= {"parameters": result.get("parameters", {}).get("total"), "training time, s": result.get("train_time")}
    numbers = {what: x for what, x in figures.items() if isinstance(x, (int, float))}
    rows = [f"| {what} | {x:,} |" if isinstance(x, int) else f"| {what} | {x:,.4f} |" for what, x in numbers.items()]
    settings = ("track", "tricks", "optimizer", "schedule", "steps", "batch_tokens", "seed", "corpus", "tokenizer")
    rows += [f"| {key} | `{config[key]}` |" for key in settings if config.get(key) not in (None, "")]
    lines = [f"# {config.get('recipe', 'GPT')} on {config.get('corpus', '?')}", ""]
    lines += ["Trained with the NanoGPT speedrun repository.", "", "| | |", "|-|-|", *rows, "", of_tokens, "", "```python"]
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("this folder"{trust})']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("this folder"{trust})', "```"]
    return "\n".join(lines) + "\n"


def write(argv: list[str]) -> str:
    flags = Parser(prog="export", description=__doc__)
    add_run(flags)
    flags.add_argument("--to", choices=("hf",), default="hf", help="form: hf, of Hugging Face's transformers")
    flags.add_argument("out", type=Path, help="folder to write")
    options = flags.parse_args(argv)
    if options.out.exists() and any(options.out.iterdir()):
        raise UsageError(f"{options.out} is not empty: name a new folder")
    run, gpt, tokenizer = opened(options)
    options.out.mkdir(parents=True, exist_ok=True)
    odd = bool(hub.odd_setting(gpt.config))
    (write_speedrun if odd else hub.write)(gpt, options.out)
    atomic_write(options.out / "README.md", card(run, odd, write_tokenizer(tokenizer, options.out)))
    return f"{options.out}: " + ("load it with trust_remote_code=True" if odd else "a GPT2LMHeadModel")


if __name__ == "__main__":
    sys.exit(command("export", lambda: write(sys.argv[1:]), sys.argv))
