"""Shelf of training methods: one paper, one file; none of them a variation inside the loop."""
