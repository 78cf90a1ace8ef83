"""TRACKS and TRICKS: what a run is, as named and sourced changes to the trainer's config.

A track fixes corpus, model size, batch and target. A trick changes the config and says where it comes from. A recipe is a
list of tricks on a track, and differs from GPT-2 + AdamW only by them.

    defaults of the config < track < tricks, in their order < the track's own tuning of those tricks < flags

Keys of an optimizer that none of these sets have their tuned values on the track, if it was tuned there (TUNED).

To add a trick: one entry in TRICKS; one field in layers/shape.py or config.py if it does something new; one test.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.run_folder import intact, read_json
from engine.spec import UsageError, nearest, split
from layers.shape import PRESETS

Settings = dict[str, Any]


@dataclass(frozen=True)
class Trick:
    """A named change to the config."""

    kind: str  # optimizer, schedule, architecture or systems
    settings: Settings
    source: str
    claim: str  # what its authors say it gives; not measured here
    scale: str = ""  # what others found at other sizes; "": nothing known


@dataclass(frozen=True)
class Track:
    """Corpus + model size + target + rules."""

    summary: str
    settings: Settings
    target_loss: float  # nats per token
    target_source: str
    recipes: dict[str, tuple[str, ...]]  # name -> tricks; "baseline" and "record" always exist
    recipe_steps: dict[str, int] = field(default_factory=dict)  # length of a recipe, where it is not the track's
    tuning: dict[str, Settings] = field(default_factory=dict)  # trick name -> its settings on this track
    workload: bool = False  # optimizers are tuned and scored on it


MODERN: Settings = dict(norm="rmsnorm", positions="half_rotary", rotary_base=1024.0, qk_norm=True, attention_scale=0.12)
MODERN |= dict(activation="relu2", embed_norm=True, zero_init_projections=True, tied_head=False, logit_softcap=15.0)

architecture, optimizer, schedule, systems = (partial(Trick, k) for k in ("architecture", "optimizer", "schedule", "systems"))

# Settings, source (#N: record N of modded-nanogpt), what its authors claim, and what others found at other sizes
# fmt: off
TRICKS: dict[str, Trick] = {
    "modern": architecture(MODERN, "modded-nanogpt, train_gpt_simple.py (optimizer track); its heads are `wide_heads`",
        "with the Muon of record 3-4: 22.3 to 15.2 minutes (record 5), 12.0 to 10.8 (record 8), and more later",
        "carried over to 350M whole (track 2 #2)"),
    "reference_script": architecture(
        dict(head_bias=True, embedding_dtype="bf16", initialisation="fan_in", tied_head=False, zero_init_projections=True),
        "modded-nanogpt, train_gpt_simple.py (optimizer track): what `modern` lacks: bias, bf16, initial weights",
        "not measured alone"),
    "rmsnorm": architecture(dict(norm="rmsnorm"), "arXiv 1910.07467; #2", "as good, cheaper"),
    "no_bias": architecture(dict(bias=False), "nanoGPT; #2", "a bit better and faster"),
    "rope": architecture(dict(positions="rotary"), "arXiv 2104.09864; #2", "45 to 31.4 min with a tuned lr"),
    "half_rope": architecture(dict(positions="half_rotary", rotary_base=1024.0), "#17 (@YouJiacheng)",
        "part of 3.80 to 3.57 min", "nanochat: no gain"),
    "qk_norm": architecture(dict(qk_norm=True), "arXiv 2010.04245; #5", "part of 22.3 to 15.2 min"),
    "attention_scale": architecture(dict(attention_scale=0.12), "#20; meant for QK-normed heads", "part of 3.14 to 2.99 min"),
    "relu2": architecture(dict(activation="relu2"), "arXiv 2109.08668; #5", "1-2 % better than GELU",
        "nanochat keeps it over SwiGLU to 26 layers"),
    "zero_init_projections": architecture(dict(zero_init_projections=True), "muP, arXiv 2203.03466; #5",
        "part of 22.3 to 15.2 min"),
    "untied_head": architecture(dict(tied_head=False), "#8", "12.0 to 10.8 min"),
    "embed_norm": architecture(dict(embed_norm=True), "#8", "part of 12.0 to 10.8 min"),
    "logit_softcap": architecture(dict(logit_softcap=15.0, softcap_form="rational"), "Gemma 2, arXiv 2408.00118; #9, #18",
        "part of 10.8 to 8.2 min", "its README doubts that it scales; nanochat: helps to 26 layers, 20 best"),
    "tanh_softcap": architecture(dict(logit_softcap=30.0, softcap_form="tanh"), "Gemma 2, arXiv 2408.00118; #9",
        "3.2844 to 3.2791 loss at 3,200 steps, one run, for 2 % longer steps", "as `logit_softcap`"),
    "logit_rescale": architecture(dict(logit_softcap=23.0, softcap_form="sigmoid"), "asymmetric logit rescale, #54",
        "1.988 to 1.940 min; 2.9 s on one machine", "nanochat: no gain"),
    "wide_heads": architecture(dict(heads=2),
        "modded-nanogpt since its first record: heads of 128 (6 on 768 channels) instead of GPT-2's 64",
        "not measured alone; fewer, larger matrix products"),
    "no_clip": optimizer(dict(clip=0.0), "#3: Muon's step size ignores the gradient's", "not measured alone"),
    "padded_vocab": systems(dict(vocab_multiple=128), "nanoGPT (50,304 rows); #5", "faster head on tensor cores"),
    "fp8_head": systems(dict(head_dtype="auto", vocab_multiple=128),
        "#19: the head's products in 8-bit floats; left out, with a message, on cards without them", "part of 3.4 to 3.142 min",
        "350M: no gain in time, taken out (track 2 #7, #18); nanochat, in all layers: 5 % at equal quality at 24 layers, none "
        "at 12"),
    "compile": systems(dict(compile=True),
        "torch.compile; modded-nanogpt since its start. Fuses the element-wise passes between matrix products",
        "nanoGPT: 250 to 135 ms a step on an A100. Compilation (on CPU under a minute, once) is off the clock"),
    "ngram_embedding": architecture(dict(ngram_buckets=16384, ngram_orders="2,3"), "#62 (bigram hash embedding)",
        "1.75 to 1.66 min", "nanochat: adopted, then no gain from 25 layers on"),
    "value_embeddings": architecture(dict(value_embeddings=3), "#14, #17; after value residual learning, arXiv 2410.17897",
        "4.66 to 4.41 min (#14); thinned from all blocks to six, part of 3.80 to 3.57 (#17)",
        "350M: two more saved 23 s of 24.5 min (track 2 #9); nanochat: helps a lot to 26 layers"),
    "value_gates": architecture(dict(value_embeddings=3, value_gates=True), "gates on value embeddings, #55",
        "1.940 to 1.918 min, with a gate on the skip; about 0.003 of loss"),
    "input_shortcut": architecture(dict(input_shortcut=True), "embedding shortcut with learned weights, #9",
        "3.3065 to 3.2972 loss at 3,200 steps, one run, for 4 % longer steps",
        "nanochat: gain shrinks with depth, 0.0103 bits a byte at 8 layers to 0.0039 at 20"),
    "unet_skips": architecture(dict(skips="unet"), "#11",
        "part of 7.8 to 7.2 min, with twice the learning rate; #45 dropped all but one", "nanochat: worse"),
    "single_skip": architecture(dict(skips="single"), "#45, its gate #55",
        "part of 2.269 to 2.248 min; without it 0.0025 of loss", "nanochat: worse"),
    "smear": architecture(dict(smear=True), "#34", "2.565 to 2.547 min", "nanochat: no gain at first, adopted after retuning"),
    "backout": architecture(dict(backout=True), "#40; since #81 part of denser connections",
        "part of 2.447 to 2.358 min; 6.2 s on one machine, with other tuning",
        "350M: 3 s of 23.08 min (track 2 #15); nanochat: no gain at first, adopted after retuning"),
    "attention_gate": architecture(dict(attention_gate=True), "sparse attention gate, #28",
        "2.817 to 2.812 min, 55 of 1,750 steps", "nanochat: no gain"),
    "exclusive_attention": architecture(dict(exclusive_attention=True),
        "learnable XSA, #82, where only the upper blocks have it", "1.363 to 1.353 min; 0.7 s on one machine"),
    "key_offset": architecture(dict(positions="half_rotary", rotary_base=1024.0, key_offset=True),
        "partial key offset, #49, where only blocks with long windows have it",
        "2.170 to 2.146 min; 2.4 s on one machine. Its README: lowest loss in every block"),
    "long_short_windows": architecture(dict(window_pattern="LSSS"),
        "#20, after Gemma 2 (arXiv 2408.00118): attention sees the whole window in one block of four, half of it in the others",
        "part of 3.142 to 2.992 min; the windows themselves: #12, #13", "nanochat keeps sliding windows to 26 layers"),
    "window_warmup": schedule(dict(window_stages=(0.25, 0.5, 1.0)), "#13 (each block of 64 tokens), #29 (stages)",
        "5.03 to 4.66 min; 1,875 to 1,750 steps",
        "350M: a cubic course and twice the largest window, part of 25.29 to 24.50 min (track 2 #8)"),
    "yarn": schedule(dict(positions="half_rotary", rotary_base=1024.0, window_stages=(0.25, 0.5, 1.0), yarn=True),
        "YaRN, arXiv 2309.00071, at each change of the window: #31", "2.717 to 2.656 min; 1,705 to 1,670 steps"),
    "document_mask": architecture(dict(document_mask=True),
        "#12, with FlexAttention; as there, smear, key offset and n-grams still see the previous document",
        "with sequences of 64K tokens instead of 1,024: 7.2 to 5.03 min, 3,000 to 1,875 steps", "nanochat: no gain"),
    "align_documents": schedule(dict(align_documents=True), "#26", "2.896 to 2.863 min, with a longer cool-down"),
    "muon": optimizer(dict(optimizer="muon", schedule="wsd:cooldown=0.7"),
        "Jordan et al. 2024, kellerjordan.github.io/posts/muon; #3", "31.4 to 24.9 min",
        "1.4x fewer tokens than tuned AdamW at 130M, 1.1-1.2x at 1.2B (arXiv 2509.02046); modded-nanogpt at 1.5B: 1.32x less "
        "time or better"),
    "polar_express": optimizer(dict(optimizer="muon:coefficients=polar_express,steps=5", schedule="wsd:cooldown=0.7"),
        "arXiv 2505.16932; #38", "2.483 to 2.476 min; 1.1 s on one machine", "nanochat: no effect"),
    "normuon": optimizer(dict(optimizer="muon:normuon=true", schedule="wsd:cooldown=0.7"), "arXiv 2510.05491; #41",
        "2.358 to 2.345 min, and 3.3 s more once its rate was tuned (#42); on the optimizer track as good as tuned Muon",
        "nanochat: small gain to 26 layers"),
    "equal_rows": optimizer(dict(optimizer="muon:equal_rows=true", schedule="wsd:cooldown=0.7"),
        "MuonEq-R, arXiv 2603.28254; nanochat", "very slight (nanochat)"),
    "cautious_decay": optimizer(dict(optimizer="muon:cautious=true", schedule="wsd:cooldown=0.7"),
        "cautious weight decay, arXiv 2510.12402; #43, whose decay also falls with the learning rate",
        "2.313 to 2.284 min; 2.2 s on one machine", "nanochat: helps to 26 layers, with a decay that falls as 1 / width^2"),
    "cautious_rest": optimizer(dict(optimizer="muon:adamw_cautious=true,adamw_weight_decay=0.005", schedule="wsd:cooldown=0.7"),
        "#50: cautious decay of what AdamW updates beside Muon", "2.146 to 2.128 min; 1.2 s on one machine"),
    "adam_every_other": optimizer(dict(optimizer="muon:adamw_every=2", schedule="wsd:cooldown=0.7"),
        "#39: AdamW moves every second step, by both steps' gradients",
        "part of 2.476 to 2.447 min, with a batch smaller by a third; 0.6 s on one machine", "nanochat: worse"),
    "embedding_beta2": optimizer(dict(optimizer="muon:embedding_beta2=0.99"),
        "chosen here: a row of an n-gram table is met rarely, so its squares are averaged over more steps",
        "not measured elsewhere"),
    "bf16_weights": systems(dict(weights="bf16"), "#57: bf16 matrices, the other 16 bits of each weight kept for the update",
        "part of 1.894 to 1.878 min; 1.1 s on one machine"),
    "momentum_warmup": schedule(dict(momentum_schedule="ramp"), "#9", "3.2972 to 3.2844 loss at 3,200 steps, one run"),
    "momentum_cooldown": schedule(dict(momentum_schedule="ramp:warmup=0.124,cooldown=0.021"),
        "#39: 50 of 2,420 steps, after the warm-up over 300 of them", "called a minor improvement; part of 2.476 to 2.447 min"),
    "batch_stages": schedule(dict(batch_stages=(1, 2, 3), batch_rates=(1.0, 1.52, 1.73)),
        "batch-size schedule, #46; batch_tokens is the smallest batch", "2.248 to 2.203 min; 1.8 s on one machine",
        "nanochat: too complex for its gain; Kimi K2 and GLM 4.5 grow their batches"),
    "short_sequences": schedule(dict(length_stages=(0.5, 1.0)),
        "#72, which cuts documents at 896 tokens, later at 2,048; here sequences are cut in two",
        "1.516 to 1.496 min, with a higher final learning rate"),
    "three_lengths": schedule(dict(length_stages=(0.25, 0.5, 1.0)),
        "`short_sequences` in three stages: quarters, halves, whole sequences", "chosen here, not measured elsewhere"),
    "small_batch": schedule(dict(batch_tokens=512),
        "#21 (524,288 to 393,216 tokens), #39 (to 262,144); with `batch_stages` this is the first stage (#46)",
        "2.992 to 2.933 min (#21); part of 2.476 to 2.447 (#39)",
        "nanochat: the best batch grows, from 0.5M tokens at 12 layers to 1M at 26"),
    "multi_token": schedule(dict(future_tokens=2), "multi-token prediction without extra heads, #53",
        "part of 2.037 to 1.988 min, with the untied head; 3.1 s on one machine",
        "350M, with smear: 2 s of 23.03 min (track 2 #16); nanochat: worse"),
    "retied_head": schedule(dict(tied_head=False, tied_until=0.667), "#51 (tied), #53 (untied at two thirds)",
        "2.128 to 2.075 min (#51); part of 2.037 to 1.988 min (#53)"),
    "wsd": schedule(dict(schedule="wsd:cooldown=0.4"), "arXiv 2405.18392; modded-nanogpt", "equal to tuned cosine"),
    "linear": schedule(dict(schedule="linear:warmup=0.05"), "arXiv 2502.15938", "better than cosine to 10 %"),
}
# fmt: on

# What is believed to pay on GPT-2's tracks: each is part of record 51, or came with #54 to #57, and compiles whole. Its loss at
# full length is not known, and nothing was tuned.
GPT2_RECORD: tuple[str, ...] = (
    "modern", "wide_heads", "padded_vocab", "muon", "no_clip", "compile",  # the optimizer track: `modern_muon`
    "polar_express", "normuon", "cautious_decay", "momentum_warmup",  # keys of Muon: 2.483 to 2.284 min together, with others
    "value_gates", "input_shortcut", "smear", "backout", "key_offset",  # each fewer steps, at a few small passes over memory
    "long_short_windows", "yarn", "document_mask", "align_documents",  # longer context at less attention: 7.2 to 5.03 min
    "retied_head", "logit_rescale",  # 2.128 to 2.075 min; 1.988 to 1.940
    "batch_stages", "small_batch", "bf16_weights",  # 2.248 to 2.203 min; more updates a token; half of the casts and the wire
)  # fmt: skip
# left out: what its own field doubts (multi_token, attention_gate, skips: nanochat), n-gram tables (their gain goes with size),
# and exclusive_attention, which came to another model (#82)

CPU_RECORD: tuple[str, ...] = (
    "modern", "no_bias", "wide_heads", "muon", "polar_express", "equal_rows", "embedding_beta2", "momentum_warmup", "wsd",
    "three_lengths", "ngram_embedding", "compile",
)  # fmt: skip

GPT2_BASELINE: Settings = dict(corpus="fineweb10B", tokenizer="gpt2", vocab_size=50257, sequence_length=1024)
GPT2_BASELINE |= dict(batch_tokens=524288, val_tokens=10485760, val_spread=False, clip=1.0)

BYTES: Settings = dict(tokenizer="bytes", vocab_size=256, end_of_text=0)


def workload(summary: str, settings: Settings) -> Track:
    """A track for contests of optimizers, a minute of one slow core: all but the optimizer and its schedule is fixed."""
    common = dict(sequence_length=128, clip=1.0, optimizer="adamw", schedule="cosine:warmup=0.05", val_spread=True)
    recipes = {"baseline": (), "record": ("muon",)}
    return Track(f"workload: {summary}", common | settings, 0.0, "set by `compare tune`", recipes, workload=True)


# fmt: off
TRACKS: dict[str, Track] = {
    "tiny": Track(
        summary="seconds: for tests and a first look",
        settings=BYTES | dict(
            corpus="sotu", sequence_length=64, layers=2, heads=2, width=64, batch_tokens=1024, val_tokens=8192, steps=60,
            val_spread=True, optimizer="adamw:lr=3e-3", clip=1.0, schedule="linear:warmup=0.1"),
        target_loss=3.0, target_source="chosen: below the entropy of single bytes (3.1 nats), reached in seconds",
        recipes={"baseline": (), "record": ("modern", "muon")},
        tuning={"batch_stages": dict(batch_tokens=512)},
    ),
    "cpu": Track(
        summary="bytes of State of the Union addresses on a laptop: baseline in about 10 minutes",
        settings=BYTES | dict(
            corpus="sotu", sequence_length=256, layers=4, heads=4, width=256, batch_tokens=4096, val_tokens=262144,
            val_spread=True, val_also="tail,wiki", steps=2400, clip=1.0, optimizer="adamw:lr=2e-3",
            schedule="cosine:warmup=100"),
        target_loss=1.13, target_source="see records/README.md",
        recipes={"baseline": (), "record": CPU_RECORD}, recipe_steps={"record": 215},
        tuning={
            "wide_heads": dict(heads=2),
            "muon": dict(optimizer="muon:lr=0.0155,momentum=0.9642,weight_decay=0.177,adamw_lr=0.00779",
                schedule="cosine:warmup=0.0825"),  # as tuned on bytes-large; record 010
            "polar_express": dict(optimizer="muon:coefficients=polar_express,steps=3"),  # records/README.md: no worse
            # a byte alone says little; narrow vectors keep the tables within twice the baseline's parameters
            "ngram_embedding": dict(ngram_buckets=25600, ngram_orders="2,3,4,5,6,7,8,9", ngram_width=16, rates="ngrams=4"),
            "wsd": dict(schedule="wsd:cooldown=0.8"),
            "three_lengths": dict(optimizer="muon:lr=0.02"),  # record 014
            "batch_stages": dict(batch_tokens=2048), "small_batch": dict(batch_tokens=2048),
        },
    ),
    "bytes-small": workload("bytes of sotu, GPT-2 of 0.1M parameters", BYTES | dict(
        corpus="sotu", layers=2, heads=2, width=64, batch_tokens=1024, val_tokens=16384, steps=500)),
    "bytes-large": workload("bytes of sotu, `modern` GPT of 0.6M parameters", BYTES | MODERN | dict(
        corpus="sotu", layers=3, heads=2, width=128, batch_tokens=1024, val_tokens=16384, steps=200)),
    "wiki": workload("bytes of wiki, `modern` GPT of 0.1M parameters", BYTES | MODERN | dict(
        corpus="wiki", layers=2, heads=2, width=64, batch_tokens=1024, val_tokens=16384, steps=400)),
    "tokens": workload("GPT-2 tokens of sotu, a vocabulary with a long tail", dict(
        corpus="sotu", tokenizer="gpt2", vocab_size=50257, sequence_length=64, layers=1, heads=2, width=32, batch_tokens=256,
        val_tokens=4096, steps=100)),
    "division": workload("a / b modulo 97, half of all equations; loss on the answer", dict(
        corpus="division", tokenizer="mod97", vocab_size=98, end_of_text=97, sequence_length=4, loss_tokens=2,
        layers=1, heads=2, width=128, batch_tokens=1024, val_tokens=18620, steps=1000)),
    "gpt2-small": Track(
        summary="124M on FineWeb to 3.28: modded-nanogpt's track 1",
        settings=GPT2_BASELINE | PRESETS["124M"] | dict(
            steps=19560, optimizer="adamw:lr=6e-4,beta2=0.95,weight_decay=0.1", schedule="cosine:warmup=700"),
        target_loss=3.28, target_source="llm.c's GPT-2 124M after 10B tokens (modded-nanogpt record 1)",
        recipes={"baseline": (), "modern_muon": (*GPT2_RECORD[:6], "reference_script"), "record": GPT2_RECORD},
        # modern_muon: entry #36 of modded-nanogpt's optimizer track, 12 x 768 with 6 heads of 128, tuned Muon, 3,250 steps.
        # Two things differ: there the 47 rows that pad the vocabulary count in the loss, and gains and biases decay as well.
        # record: 2,035 steps of 131,072 to 393,216 tokens, as record 51, which has besides one block without attention and one
        # without MLP
        recipe_steps={"modern_muon": 3250, "record": 2035},
        tuning={
            "wide_heads": dict(heads=6),
            # as in the log of entry #36: shards in their order; eps 1e-10 for the sum over 524,288 tokens, where ours is a mean
            "reference_script": dict(shuffle=False, optimizer="muon:adamw_weight_decay=0.001,adamw_eps=1.907e-16"),
            "batch_stages": dict(batch_tokens=262144),  # the mean is the track's batch
            "small_batch": dict(batch_tokens=131072),
            # twice the context (#29 cuts documents at 2,048); with `yarn` 384, 768, then 1,536 tokens (modded: 384 to 1,664)
            "long_short_windows": dict(sequence_length=2048, window=1536, window_pattern="LSSSLSSLSSSL"),
            "retied_head": dict(rates="embedding.weight=0.0057"),  # untied, the embedding goes on at the head's rate: 0.004
            "muon": dict(
                optimizer="muon:lr=0.025,weight_decay=0.05,steps=12,coefficients=cubic,embedding_lr=0.7,head_lr=0.004,"
                "adamw_lr=0.015,adamw_beta1=0.8,adamw_beta2=0.95", schedule="wsd:cooldown=0.7"),
        },
    ),
    "gpt2-medium": Track(
        summary="350M on FineWeb to 2.92: modded-nanogpt's track 2",
        settings=GPT2_BASELINE | PRESETS["350M"] | dict(
            steps=57220, optimizer="adamw:lr=3e-4,beta2=0.95,weight_decay=0.1", schedule="cosine:warmup=700"),
        target_loss=2.92, target_source="llm.c's GPT-2 350M (modded-nanogpt track 2)",
        recipes={"baseline": (), "modern_muon": GPT2_RECORD[:6], "record": tuple(t for t in GPT2_RECORD if t != "small_batch")},
        # modern_muon: record 2 of that track (2025-01-18) ran 7,500 steps; settings are those of gpt2-small, not tuned here.
        # record: 5,960 steps of 524,288 tokens in the mean, as record 17; #18, with about this set, needed 4,740 of a batch
        # that we do not know
        recipe_steps={"modern_muon": 7500, "record": 5960},
        tuning={
            "wide_heads": dict(heads=8),
            "batch_stages": dict(batch_tokens=262144), "small_batch": dict(batch_tokens=262144),
            "long_short_windows": dict(sequence_length=2048, window=1536, window_pattern="LSSS"),
            "muon": dict(optimizer="muon:lr=0.025,weight_decay=0.05", schedule="wsd:cooldown=0.7"),
        },
    ),
}
TRACKS["gpt2-small-10min"] = replace(TRACKS["gpt2-small"],
    summary="124M on FineWeb for ten minutes of one card's training time: which loss?",
    # one H100 takes 295 ms for a step of `record`: about so many in ten minutes
    settings=TRACKS["gpt2-small"].settings | dict(minutes=10.0, steps=2000, batch_tokens=131072, schedule="cosine:warmup=0.05"),
    target_loss=0.0, target_source="none: the loss itself is the result", recipe_steps={},
    # without the tricks that need a known number of steps
    recipes=TRACKS["gpt2-small"].recipes | {
        "record": tuple(t for t in GPT2_RECORD if t not in ("retied_head", "batch_stages"))},
)
# fmt: on


def track(name: str) -> Track:
    """The track of that name. Raises UsageError: there is none."""
    if name not in TRACKS:
        raise UsageError(f"unknown track {name!r}: {nearest(name, TRACKS)}")
    return TRACKS[name]


TUNED = Path(__file__).parent / "records" / "tuning" / "tuned.json"  # written by `compare tune`, whose trials lie beside it


def tuned(track_name: str, optimizer: str, schedule: str, file: Path | None = None) -> tuple[str, str]:
    """Optimizer and schedule; keys that `optimizer` leaves open have the values tuned for it on the track, if any. The schedule
    tuned with them replaces the track's own, but no other that was chosen. file: instead of TUNED."""
    with intact(file := file or TUNED):
        best = file.exists() and read_json(file).get(track_name, {}).get(split(optimizer)[0])
        if not best:
            return optimizer, schedule
        own = schedule == TRACKS[track_name].settings.get("schedule")
        return merge_optimizer(best["optimizer"], optimizer), str(best["schedule"]) if own else schedule


def merge_optimizer(old: str, new: str) -> str:
    """A trick that names the optimizer already chosen changes only the keys it names: muon:lr=1 + muon:steps=4."""
    (old_name, old_keys), (name, keys) = split(old), split(new)
    merged = old_keys | keys if old_name == name else keys
    return name + ":" * bool(merged) + ",".join(f"{key}={value}" for key, value in merged.items())


def listed(track_name: str, words: str) -> list[tuple[str, tuple[str, ...]]]:
    """The words of a comma-separated list, each with its tricks: several for a recipe. Raises UsageError: unknown name."""
    recipes = track(track_name).recipes
    names = [word.strip() for word in words.split(",") if word.strip()]
    for name in names:
        if name not in TRICKS and name not in recipes:
            raise UsageError(f"unknown trick {name!r}: {nearest(name, [*TRICKS, *recipes])}")
    return [(name, recipes.get(name, (name,))) for name in names]


def spelled_out(track_name: str, words: str) -> list[str]:
    """The tricks of a comma-separated list, recipes replaced by theirs. Raises UsageError: unknown track or trick."""
    return [trick for _, tricks in listed(track_name, words) for trick in tricks]


def apply(track_name: str, words: str) -> tuple[Settings, str]:
    """What a track and a list of tricks and recipes set, and the recipe's name. Raises UsageError: unknown name."""
    chosen = track(track_name)
    settings = dict(chosen.settings, target_loss=chosen.target_loss)
    named = listed(track_name, words) or [("baseline", ())]
    for name, tricks in named:
        for trick in tricks:
            changes = TRICKS[trick].settings | chosen.tuning.get(trick, {})
            if "optimizer" in changes:
                changes["optimizer"] = merge_optimizer(settings["optimizer"], changes["optimizer"])
            settings |= changes
        settings["steps"] = chosen.recipe_steps.get(name, settings["steps"])
    return settings, "+".join(name for name, _ in named)
