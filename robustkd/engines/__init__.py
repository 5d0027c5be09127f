"""Shelf of engines: whatever turns images into logits, behind one contract."""
