"""Tests of albef_core.objectives."""
