"""Memorised pictures: detected, located in weights, cut out, and searched for again (Dori)."""
