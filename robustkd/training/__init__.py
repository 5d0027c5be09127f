"""Distillation: recipe and teachers in, checkpoint bundle out."""
