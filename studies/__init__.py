"""Experiments that show one claim each, small."""
