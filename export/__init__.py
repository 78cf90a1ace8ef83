"""Trained models for others: python -m export."""
