"""Paper-scale results: what to compute (``plan``), how (``steps``), and from it tables and figures.

``python -m reproduce`` runs the workflow of the Snakefile; the README says how to use it.
"""
