"""Shelf of networks: one file per architecture; normalisation, where there is any, is the first layer."""
