"""Losses: they hold no parameters, compute in fp32, never wait for the device."""

from roadwork.losses.auxiliary import WeatherLoss
from roadwork.losses.consistency import ViewConsistencyLoss, ViewSupervision, pool_views
from roadwork.losses.focal import FocalLoss, sigmoid_focal_loss
from roadwork.losses.segmentation import SegmentationLoss
from roadwork.losses.total import TERMS, Counts, Targets, TotalLoss

__all__ = [
    "TERMS",
    "Counts",
    "FocalLoss",
    "SegmentationLoss",
    "Targets",
    "TotalLoss",
    "ViewConsistencyLoss",
    "ViewSupervision",
    "WeatherLoss",
    "pool_views",
    "sigmoid_focal_loss",
]
