"""Trained models for others: a folder that `transformers` loads, with tokenizer and model card.

    ./run.sh export --run runs/cpu/record-s0-1a2b3c4d --to hf OUT

A GPT-2 as published becomes a GPT2LMHeadModel; every other model is loaded with trust_remote_code by `modeling_speedrun.py`,
which is copied beside it.
"""
