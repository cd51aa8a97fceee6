"""Adversarial examples: attacks, defenses and their theory, as derived in the book.

``adv.geometry`` holds norms and projections, ``adv.attacks`` and ``adv.defenses`` the methods,
``adv.theory`` closed forms, and ``adv.lab`` what an experiment needs around a method.
"""
