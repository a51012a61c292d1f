"""Distributed training of a roadwork detector for street photos with GPS."""
