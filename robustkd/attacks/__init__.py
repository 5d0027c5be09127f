"""Attacks: one file per entry. Whatever an attack returns, success is judged on the model under audit."""
