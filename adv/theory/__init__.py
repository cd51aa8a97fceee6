"""Theory: closed forms and proofs, in float64; nothing is trained here."""
