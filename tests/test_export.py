"""Weights that travel: to and from Hugging Face's GPT-2 and nanoGPT, and our own models with their code; the same logits."""

import json
import shutil

import pytest
import torch
from shared import BACK, PATHS, result
from test_model import TOKENS, awake, small

import hub
import train_gpt
from config import resolve
from engine.spec import UsageError
from export import __main__ as export
from layers.shape import ModelConfig
from model import GPT

transformers = pytest.importorskip("transformers")


def published(**changed):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=2, **changed)
    hf = transformers.GPT2LMHeadModel(config).eval()
    for p in hf.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return hf


def read(path) -> GPT:
    gpt = GPT(ModelConfig(**hub.read(str(path))[0])).eval()
    hub.fill(gpt, str(path))
    return gpt


@torch.no_grad()
def gap(ours, theirs) -> float:
    return (ours(TOKENS) - theirs(TOKENS).logits).abs().max()


@pytest.fixture(autouse=True)
def _device_constructors():
    """transformers takes torch.linspace out of those that `torch.device` reaches, for the whole process."""
    yield
    torch.utils._device._device_constructors.cache_clear()


def test_gpt2_of_hugging_face_and_back(tmp_path):
    without_dropout = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    for i, changed in enumerate(({}, dict(tie_word_embeddings=False, n_inner=64, **without_dropout))):
        hf = published(**changed)
        hf.save_pretrained(tmp_path / f"theirs{i}")
        ours = read(tmp_path / f"theirs{i}")
        assert gap(ours, hf) < 1e-4
        hub.write(ours, tmp_path / f"ours{i}")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"ours{i}").eval()
        assert gap(ours, again) < 1e-4 and type(again).__name__ == "GPT2LMHeadModel"
    gpt = awake(small(bias=False, tied_head=False, vocab_multiple=64)).eval()
    hub.write(gpt, tmp_path / "plain")
    assert gap(gpt, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()) < 1e-4
    odd = (
        dict(activation_function="relu"),
        dict(embd_pdrop=0.5),
        dict(scale_attn_weights=False),
        dict(layer_norm_epsilon=1e-2),
    )
    for changed in (*odd, dict(scale_attn_by_inverse_layer_idx=True), dict(attn_pdrop=0.5)):
        with pytest.raises(UsageError, match=f"{next(iter(changed))} .* cannot be taken over"):
            hub.of_huggingface(transformers.GPT2Config(**changed).to_dict(), {})


def test_checkpoint_of_nanogpt(tmp_path):
    """Its names are Hugging Face's; its matrices are not transposed, and torch.compile has put a word before each."""
    hf, state = published(), {}
    for name, w in hf.state_dict().items():
        state[f"_orig_mod.{name}"] = (
            w.t().contiguous() if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")) else w
        )
    given = dict(n_layer=2, n_head=2, n_embd=32, block_size=48, bias=True, vocab_size=97, dropout=0.0)
    torch.save({"model": state, "model_args": given, "iter_num": 5}, tmp_path / "ckpt.pt")
    assert gap(read(tmp_path / "ckpt.pt"), hf) < 1e-4


def test_what_is_no_model_is_one_line(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    torch.save({"model": Code()}, tmp_path / "evil.pt")
    (tmp_path / "empty").mkdir()
    published().save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"x" * 100)
    for name in ("evil.pt", "empty", "cut", "nowhere"):
        with pytest.raises(UsageError) as refused:
            hub.read(f"hf:{tmp_path / name}")
        assert name in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "mark").exists()
    published().save_pretrained(tmp_path / "whole")
    with pytest.raises(UsageError, match=r"blocks\.1"):
        hub.fill(small(layers=1), str(tmp_path / "whole"))


MODERN = dict(positions="half_rotary", norm="rmsnorm", qk_norm=True, activation="relu2", bias=False, tied_head=False)
MODERN |= dict(norm_gains=False, vocab_multiple=64)


@pytest.mark.slow
def test_our_code_for_transformers_gives_our_logits(tmp_path):
    """Every field of the model that acts in inference."""
    kinds = [MODERN, MODERN | BACK | PATHS | dict(layers=3, exclusive_attention=True, embed_norm=True)]
    kinds += [dict(skips="single", layers=6, value_embeddings=2, logit_softcap=5.0, softcap_form="sigmoid")]
    kinds += [MODERN | dict(document_mask=True, end_of_text=7, window=16, smear=True, logit_softcap=3.0)]
    kinds += [dict(norm="rmsnorm", logit_softcap=3.0, softcap_form="tanh", positions="rotary")]
    kinds[-1] |= dict(head_bias=True, embedding_dtype="bf16")
    for i, settings in enumerate(kinds):
        gpt = awake(small(**settings)).eval()
        if settings.get("yarn"):
            gpt.see((0.25, 0.5, 1.0))
        out = tmp_path / str(i)
        out.mkdir()
        export.write_speedrun(gpt, out)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
        assert gap(gpt, theirs) < 1e-4
    inference = set(ModelConfig.__dataclass_fields__) - {
        "dropout",
        "zero_init_projections",
        "attention",
        "checkpoint_activations",
    }
    untouched = {name for name in inference if all(name not in kind for kind in (*kinds, small().config.__dict__))}
    assert not untouched
    assert theirs.generate(TOKENS[:1, :5], max_new_tokens=4, do_sample=False).shape == (1, 9)


@pytest.mark.slow
def test_a_run_is_exported_and_trained_further(train, tmp_path, capsys):
    folder = train("--steps", "3")
    assert export.write(["--run", str(folder), str(tmp_path / "out")]).endswith("a GPT2LMHeadModel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Fellow citizens, é 中\n"
    assert tokenizer(text)["input_ids"] == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    about = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"| parameters | {result(folder)['parameters']['total']:,} |" in about and "| schedule | `linear:warmup=0.1` |" in about
    )
    with pytest.raises(UsageError, match="is not empty"):
        export.write(["--run", str(folder), str(tmp_path / "out")])
    for source in (tmp_path / "out", folder):
        further = train("--steps", "1", "--optimizer", "sgd:lr=0", "--init-from", str(source), out=f"further-{source.name}")
        assert result(further)["val_loss"] == pytest.approx(result(folder)["val_loss"], rel=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"n_head": 3}))
    assert train_gpt.main(["--track", "tiny", "--init-from", str(tmp_path / "out"), "--out", str(tmp_path / "x")]) == 2
    shutil.rmtree(tmp_path / "out")
    assert resolve(["--track", "tiny"])[0].init_from == ""
    capsys.readouterr()
