"""Weights that travel: GPT-2 in the form of Hugging Face, and of nanoGPT's ckpt.pt.

    shape, weights = read("gpt2")        a folder of Hugging Face, a ckpt.pt of nanoGPT, or a run folder
    write(gpt, Path("out"))              the folder that transformers' GPT2LMHeadModel.from_pretrained loads

Tensors and numbers are taken from what is read, never code.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import checkpoint
from engine.run_folder import atomic_write, read_json
from engine.spec import UsageError
from layers.shape import ModelConfig
from model import GPT

NAMES = {"wte": "embedding", "wpe": "positions", "ln_f": "norm", "h": "blocks", "ln_1": "norm1", "ln_2": "norm2",
         "attn": "attention", "c_attn": "qkv", "c_fc": "up", "c_proj": "projection", "lm_head": "head"}  # fmt: skip
SHAPE = {"vocab_size": "vocab_size", "sequence_length": "n_positions", "layers": "n_layer", "heads": "n_head",
         "width": "n_embd"}  # fmt: skip
TRANSPOSED = ("qkv.weight", "up.weight", "projection.weight")  # Hugging Face's Conv1D stores them so
# What a GPT-2 of Hugging Face must have to be one of ours
FIXED = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
         "activation_function": "gelu_new", "add_cross_attention": False}  # fmt: skip
# ... and a model of ours to be a GPT-2 of Hugging Face, beside its shape
PUBLISHED = ("vocab_size", "sequence_length", "layers", "heads", "width", "mlp_ratio", "dropout", "tied_head", "bias",
             "vocab_multiple", "zero_init_projections", "attention", "checkpoint_activations", "head_dtype",
             "end_of_text")  # fmt: skip


def read(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of ModelConfig, and weights by our names. Raises UsageError: of no form above, damaged, or no model of ours."""
    path = Path(source.removeprefix("hf:"))
    try:
        if path.is_file():
            return of_nanogpt(torch.load(path, map_location="cpu", weights_only=True))
        if (path / "log.jsonl").exists():
            return of_run(path)
        return of_huggingface(read_json(path / "config.json"), load_file(path / "model.safetensors"))
    except UsageError:
        raise
    except Exception as error:  # whatever a damaged file, or one of somebody else's, makes its reader raise
        forms = "a folder with config.json and model.safetensors, a ckpt.pt of nanoGPT, or a run folder"
        raise UsageError(f"{path} is not {forms} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})") from None


def of_huggingface(config: dict[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of a GPT2LMHeadModel."""
    pdrop = config.get("resid_pdrop", 0.1)
    same = FIXED | {"embd_pdrop": pdrop, "attn_pdrop": pdrop}
    if differs := [f"{key} {config[key]}" for key, value in same.items() if config.get(key, value) != value]:
        raise UsageError(f"a GPT-2 with {', '.join(differs)} cannot be taken over")
    shape = {name: config[theirs] for name, theirs in SHAPE.items()} | {"dropout": pdrop}
    shape["mlp_ratio"] = (config.get("n_inner") or 4 * config["n_embd"]) // config["n_embd"]
    return shape | {"tied_head": config.get("tie_word_embeddings", True)}, ours(state, TRANSPOSED)


def of_nanogpt(stored: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of the dictionary that nanoGPT's train.py saves."""
    given = stored["model_args"]
    shape = {name: given["block_size" if theirs == "n_positions" else theirs] for name, theirs in SHAPE.items()}
    shape |= {"dropout": given.get("dropout", 0.0), "bias": given.get("bias", True)}
    return shape, ours({name.removeprefix("_orig_mod."): w for name, w in stored["model"].items()}, ())


def of_run(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of a run folder of the trainer: its newest checkpoint."""
    config = read_json(folder / "config.json")
    shape = {f.name: config[f.name] for f in fields(ModelConfig) if f.name in config}
    weights = load_file(checkpoint.trained(folder) / checkpoint.WEIGHTS)
    return shape, {"head.weight": weights["embedding.weight"]} | weights


def ours(state: dict[str, Tensor], transposed: tuple[str, ...]) -> dict[str, Tensor]:
    """Weights by our names; causal masks, which older releases store too, are left out."""
    weights = {}
    for name, value in state.items():
        known = ".".join(NAMES.get(part, part) for part in name.removeprefix("transformer.").split("."))
        if not known.endswith(("attention.bias", "attention.masked_bias")):
            weights[known] = value.t() if known.endswith(transposed) else value
    return {"head.weight": weights["embedding.weight"]} | weights


def fill(gpt: GPT, source: str) -> None:
    """Load weights; "" leaves them as they are. Raises UsageError: as `read`, or the model has other ones."""
    if not source:
        return
    weights = read(source)[1]
    wanted, given = ({name: tuple(w.shape) for name, w in state.items()} for state in (gpt.state_dict(), weights))
    if name := min((name for name in wanted | given if wanted.get(name) != given.get(name)), default=""):
        raise UsageError(f"{source}: {name} is {given.get(name, 'missing')}, the model's is {wanted.get(name, 'none')}")
    gpt.load_state_dict(weights)


def odd_setting(config: ModelConfig) -> str:
    """The first setting that no GPT-2 of transformers has; empty: the model is one."""
    return next((f.name for f in fields(config) if f.name not in PUBLISHED and getattr(config, f.name) != f.default), "")


def write(gpt: GPT, out: Path) -> None:
    """config.json and model.safetensors of a GPT2LMHeadModel, of a model without an `odd_setting`; missing biases are zeros,
    padding of the vocabulary is cut off."""
    c = gpt.config
    back = {ours: theirs for theirs, ours in NAMES.items()}
    state = {}
    for name, value in gpt.state_dict().items():
        cut = value[: c.vocab_size] if name in ("embedding.weight", "head.weight") else value
        theirs = ".".join(back.get(part, part) for part in name.split("."))
        theirs = theirs if theirs.startswith("lm_head") else f"transformer.{theirs}"
        state[theirs] = (cut.t() if name.endswith(TRANSPOSED) else cut).float().contiguous().clone()
        if not c.bias and name.endswith((*TRANSPOSED, "norm.weight", "norm1.weight", "norm2.weight")):
            state[theirs.replace(".weight", ".bias")] = torch.zeros(value.size(0))
    if c.tied_head:
        del state["lm_head.weight"]
    shape = {theirs: getattr(c, name) for name, theirs in SHAPE.items()}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
    about = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", n_inner=c.mlp_ratio * c.width)
    out.mkdir(parents=True, exist_ok=True)
    config = about | shape | drop | FIXED | dict(tie_word_embeddings=c.tied_head)
    atomic_write(out / "config.json", json.dumps(config, indent=1))
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
