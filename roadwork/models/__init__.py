"""The detector and its blocks."""

from roadwork.models.detector import RoadworkDetector
from roadwork.models.groups import parameter_groups
from roadwork.models.outputs import Encoded, Outputs
from roadwork.models.weights import resolve_backbone

__all__ = ["Encoded", "Outputs", "RoadworkDetector", "parameter_groups", "resolve_backbone"]
