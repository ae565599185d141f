"""Hugging Face transformers: frontends/transformers.py has the rest."""

from .frontends.transformers import register as register
