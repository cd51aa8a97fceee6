"""Defenses: losses and models that resist attacks."""
